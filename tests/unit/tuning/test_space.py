"""Draws: pure functions of (seed, trial), inside their domains, as likely as they say."""

from __future__ import annotations

import math
from random import Random

import pytest

from fmray.config.sweep import (
    ChoiceDomain,
    Domain,
    GridDomain,
    LogUniformDomain,
    PbtScheduler,
    RandIntDomain,
    UniformDomain,
)
from fmray.tuning.space import mutate, nest, sample

SPACE: dict[str, Domain] = {
    "a.lr": LogUniformDomain(low=1e-5, high=1e-1),
    "a.weight": UniformDomain(low=-1, high=3),
    "b.kind": ChoiceDomain(values=("x", "y", "z")),
    "b.rank": RandIntDomain(low=1, high=4),
}


def test_a_trial_is_a_function_of_seed_and_number() -> None:
    drawn = [sample(SPACE, 7, trial) for trial in range(20)]
    assert drawn == [sample(SPACE, 7, trial) for trial in range(20)]
    assert len({str(keys) for keys in drawn}) == 20
    assert sample(SPACE, 8, 0) != drawn[0]
    # a golden value: another Python, another machine, a Ray worker draw the same
    assert sample(SPACE, 0, 3)["b.rank"] == Random("0/3/b.rank").randint(1, 4)


def test_a_key_does_not_depend_on_the_others() -> None:
    alone = {"a.weight": SPACE["a.weight"]}
    assert sample(alone, 1, 5)["a.weight"] == sample(SPACE, 1, 5)["a.weight"]


def test_draws_are_spread_as_the_domain_says() -> None:
    drawn = [sample(SPACE, 0, trial) for trial in range(4000)]
    logs = sorted(math.log10(keys["a.lr"]) for keys in drawn)
    assert -5 <= logs[0] <= logs[-1] <= -1
    assert logs[2000] == pytest.approx(-3, abs=0.1)  # the median of a log-uniform is its geometric middle
    weights = [keys["a.weight"] for keys in drawn]
    assert -1 <= min(weights) <= max(weights) <= 3
    assert sum(weights) / 4000 == pytest.approx(1, abs=0.06)
    for key, values in (("b.kind", "xyz"), ("b.rank", (1, 2, 3, 4))):
        for value in values:
            share = sum(keys[key] == value for keys in drawn) / 4000
            assert share == pytest.approx(1 / len(values), abs=0.04), (key, value)


def test_grids_are_gone_through_as_a_product() -> None:
    space: dict[str, Domain] = {
        "a": GridDomain(values=(1, 2)),
        "u": UniformDomain(low=0, high=1),
        "b": GridDomain(values=("x", "y", "z")),
    }
    drawn = [sample(space, 0, trial) for trial in range(12)]
    pairs = [(keys["a"], keys["b"]) for keys in drawn]
    assert pairs[:6] == [(1, "x"), (1, "y"), (1, "z"), (2, "x"), (2, "y"), (2, "z")]
    assert pairs[6:] == pairs[:6]
    assert len({keys["u"] for keys in drawn}) == 12
    assert list(drawn[0]) == ["a", "u", "b"]


def test_a_mutation_is_a_small_move_inside_the_domain() -> None:
    rule = PbtScheduler(interval=1, resample=0.0, factors=(0.5, 2.0))
    keys = {"a.lr": 1e-3, "a.weight": 2.5, "b.kind": "x", "b.rank": 1}
    seen = [mutate(SPACE, keys, rule, Random(seed)) for seed in range(50)]
    assert {round(moved["a.lr"], 9) for moved in seen} == {5e-4, 2e-3}
    assert {moved["a.weight"] for moved in seen} == {1.25, 3.0}  # 5.0 is outside
    assert {moved["b.kind"] for moved in seen} == {"x", "y"}  # never z, which is no neighbour
    assert {moved["b.rank"] for moved in seen} == {1, 2}
    again = PbtScheduler(interval=1, resample=1.0)
    assert len({mutate(SPACE, keys, again, Random(seed))["a.lr"] for seed in range(50)}) == 50


def test_a_choice_that_was_on_disk_is_still_known() -> None:
    space: dict[str, Domain] = {"betas": ChoiceDomain(values=((0.9, 0.99), (0.9, 0.95)))}
    rule = PbtScheduler(interval=1, resample=0.0)
    moved = {str(mutate(space, {"betas": [0.9, 0.99]}, rule, Random(seed))["betas"]) for seed in range(20)}
    assert moved == {"(0.9, 0.99)", "(0.9, 0.95)"}


def test_dotted_and_nested_keys_become_one_tree() -> None:
    assert nest({"a.b.c": 1, "a": {"b": {"d": 2}, "e.f": 3}}) == {"a": {"b": {"c": 1, "d": 2}, "e": {"f": 3}}}
