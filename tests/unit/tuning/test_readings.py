"""What counts of a trial's reports, and when a constraint is broken."""

from __future__ import annotations

import math
from typing import Any

from fmray.config.sweep import Constraint, SweepConfig
from fmray.tuning.readings import WORST, Reading, broken, missing, reading_at, score

LINES: list[dict[str, Any]] = [
    {"step": 1, "time": 0.1, "ppo/kl": 1.0},
    {"step": 2, "time": 0.2, "ppo/kl": 2.0},
    {"step": 2, "time": 0.3, "eval/score": 0.5},
    {"step": 3, "time": 0.4, "ppo/kl": 3.0},
    {"step": 4, "time": 0.5, "ppo/kl": 4.0},
    {"step": 4, "time": 0.6, "eval/score": 0.7},
    {"step": 5, "time": 0.7, "ppo/kl": 9.0},
]


def sweep(**changes: Any) -> SweepConfig:
    space = {"optimizer.lr": {"kind": "uniform", "low": 0, "high": 1}}
    return SweepConfig.model_validate({"space": space, "trials": 1, "metric": "eval/score"} | changes)


def test_a_reading_holds_the_last_values_at_its_step_and_no_later_ones() -> None:
    assert reading_at(LINES, "eval/score", 1) == Reading(2, {"ppo/kl": 2.0, "eval/score": 0.5})
    assert reading_at(LINES, "eval/score", 3) == Reading(4, {"ppo/kl": 4.0, "eval/score": 0.7})
    assert reading_at(LINES, "eval/score", None) == reading_at(LINES, "eval/score", 3)
    assert reading_at(LINES, "eval/score", 5) is None
    assert reading_at([], "eval/score", None) is None


def test_constraints_bound_from_above_and_below_and_no_number_breaks_them() -> None:
    bounds = (Constraint(metric="ppo/kl", max=8.0), Constraint(metric="eval/distinct", min=0.8))
    kept = Reading(1, {"ppo/kl": 8.0, "eval/distinct": 0.8})
    assert broken(kept, bounds) == ""
    assert broken(Reading(1, kept.values | {"ppo/kl": 8.1}), bounds) == "ppo/kl 8.1 > 8"
    assert broken(Reading(1, kept.values | {"eval/distinct": 0.5}), bounds) == "eval/distinct 0.5 < 0.8"
    assert "nan" in broken(Reading(1, kept.values | {"ppo/kl": math.nan}), bounds)


def test_the_score_is_larger_for_the_better_and_the_worst_beyond_a_constraint() -> None:
    reading = Reading(4, {"ppo/kl": 9.0, "eval/score": 0.7})
    assert score(reading, sweep()) == 0.7
    assert score(reading, sweep(mode="min")) == -0.7
    bound = [{"metric": "ppo/kl", "max": 8}]
    assert score(reading, sweep(constraints=bound)) == WORST
    assert score(Reading(4, {"eval/score": math.nan}), sweep()) == WORST
    assert missing(Reading(4, {"eval/score": 1.0}), sweep(constraints=bound)) == ["ppo/kl"]
