"""The compat presets against the real trl 0.11.4 (T5) and 1.12.0 (GPT-2), each in an environment of its own under `.parity`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmray.benchmarks.peers import TRL_0_11, TRL_1_12
from fmray.benchmarks.ppo_parity import Differences, compare_trl_0_11, compare_trl_1_12

PARITY = Path(__file__).parent.parent.parent / ".parity"
BAR = 1e-5
pytestmark = [pytest.mark.slow, pytest.mark.parity, pytest.mark.timeout(900)]

COMPARED = {
    *("log-probabilities", "reference log-probabilities", "values", "masks", "kl", "advantages", "returns"),
    *("policy loss", "value loss", "total loss", "clipped shares"),
    *("loss gradient for log-probabilities", "loss gradient for values"),
}


def within_the_bar(differences: Differences) -> None:
    print({what: f"{gap:.1e}" for what, gap in differences.worst.items()}, differences.seen)  # noqa: T201
    assert differences.worst.keys() >= COMPARED
    assert {what: gap for what, gap in differences.worst.items() if not gap <= BAR} == {}
    assert differences.seen["micro-batches with clipped ratios"] > 0
    assert differences.seen["micro-batches with clipped values"] > 0


def test_three_steps_of_trl_0_11_on_a_t5(tmp_path: Path) -> None:
    differences = compare_trl_0_11(TRL_0_11.python(PARITY), tmp_path)
    within_the_bar(differences)
    assert differences.worst.keys() >= {"rewards", "coefficient", "sequence kl", "entropy", "approximate kl"}
    assert differences.seen["micro-batches beyond the ratio threshold"] > 0


@pytest.mark.parametrize("all_options", [False, True], ids=["defaults", "k3, penalty, whitened rewards"])
def test_an_iteration_of_trl_1_12_on_a_gpt2(tmp_path: Path, all_options: bool) -> None:
    differences = compare_trl_1_12(TRL_1_12.python(PARITY), tmp_path, all_options=all_options)
    within_the_bar(differences)
    assert ("rewards" in differences.worst) != all_options
    assert differences.seen["answers that ended"] > 0
    assert differences.seen["answers that did not"] > 0
