"""Mistakes at every kind of place of the shipped files: how many are named, on the right line, with a cure."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fmray.checks.findings import Finding
from tests.unit.checks.conftest import Check
from tests.unit.checks.mutants import SHIPPED, Mutant, mutants

BAR = 0.98


def every_mutant(seed: int) -> list[Mutant]:
    rng = random.Random(seed)
    return [mutant for path in SHIPPED for mutant in mutants(path, rng)]


def named(mutant: Mutant, findings: list[Finding]) -> bool:
    """An error on the line, with a cure; where there is one right word, the cure (or the key in question) holds it."""
    for finding in findings:
        if finding.severity == "error" and finding.line in mutant.lines and finding.cure:
            in_key = mutant.kind in ("moved", "lost") and str(mutant.cure_names) in finding.key
            if mutant.cure_names is None or mutant.cure_names in finding.cure or in_key:
                return True
    return False


def measure(chosen: list[Mutant], check: Check) -> tuple[float, str]:
    """The share that is named, and what is not, in words."""
    missed = [mutant for mutant in chosen if not named(mutant, check(mutant.text))]
    kinds, lost = Counter(mutant.kind for mutant in chosen), Counter(mutant.kind for mutant in missed)
    table = ", ".join(f"{kind} {count - lost[kind]}/{count}" for kind, count in sorted(kinds.items()))
    words = "\n".join(f"{mutant.kind}: {mutant.file}: {mutant.path}" for mutant in missed)
    return 1 - len(missed) / len(chosen), f"{table}\n{words}"


def test_a_sample_of_mutants_of_every_kind_is_named(check: Check) -> None:
    everything = every_mutant(seed=0)
    assert len(everything) > 2000
    assert {mutant.kind for mutant in everything} == {
        *("misspelt", "moved", "retyped", "out of range", "name", "doubled", "lost")
    }
    chosen = random.Random(1).sample(everything, 210)
    share, words = measure(chosen, check)
    assert share >= BAR, words


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_all_mutants_are_named(seed: int, check: Check) -> None:
    share, words = measure(every_mutant(seed), check)
    assert share >= BAR, words
    print(words)  # noqa: T201 — the figure, for `pytest -s`
