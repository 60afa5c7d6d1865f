"""What a trial has shown: its metrics at a step, whether they keep the constraints, and the one number that is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fmray.config.sweep import Constraint, SweepConfig

WORST = -1e30
"""Score of a trial that breaks a constraint or has no number: finite, so that schedulers may take quantiles over it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The last value of every metric at a step at which the sweep's metric was reported. `Reading(4, {"eval/r5": 0.6})`."""

    step: int
    values: dict[str, float]


def reading_at(lines: Sequence[Mapping[str, Any]], metric: str, step: int | None) -> Reading | None:
    """The first reading at or after `step` (None: the last one) in a run's metrics.jsonl; None where there is none yet."""
    steps = [int(line["step"]) for line in lines if metric in line and (step is None or line["step"] >= step)]
    if not steps:
        return None
    at = steps[-1] if step is None else steps[0]
    values: dict[str, float] = {}
    for line in lines:
        if line["step"] <= at:
            values |= {name: value for name, value in line.items() if name not in ("step", "time")}
    return Reading(at, values)


def broken(reading: Reading, constraints: Sequence[Constraint]) -> str:
    """The first constraint that does not hold, as text; empty where all do. A value that is not a number breaks any."""
    for bound in constraints:
        value = reading.values[bound.metric]
        if bound.max is not None and not value <= bound.max:
            return f"{bound.metric} {value:.4g} > {bound.max:g}"
        if bound.min is not None and not value >= bound.min:
            return f"{bound.metric} {value:.4g} < {bound.min:g}"
    return ""


def value_for(value: float, mode: Literal["max", "min"]) -> float:
    """The metric, larger is better; WORST where it is not a finite number."""

    return (value if mode == "max" else -value) if math.isfinite(value) else WORST


def score(reading: Reading, sweep: SweepConfig) -> float:
    """What schedulers compare: larger is better, WORST where a constraint is broken."""
    if broken(reading, sweep.constraints):
        return WORST
    return value_for(reading.values[sweep.metric], sweep.mode)


def missing(reading: Reading, sweep: SweepConfig) -> list[str]:
    """Constraint metrics that were never reported up to here."""
    return [bound.metric for bound in sweep.constraints if bound.metric not in reading.values]
