"""The sweep as a table: one row for each trial, which of them is the best, which trade-offs nothing beats."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fmray.tuning.pareto import pareto_front
from fmray.tuning.readings import WORST, broken, missing, value_for
from fmray.tuning.trials import Change, Status, Trials, keys_text

TABLE = "sweep.json"


@dataclass(frozen=True, slots=True)
class Row:
    """One trial."""

    name: str
    keys: dict[str, Any]
    status: Status
    step: int
    """Step of the metrics; 0 before the first."""
    metrics: dict[str, float]
    """Last values at that step."""
    feasible: bool
    """Whether the constraints hold; False before the first metrics."""
    note: str
    """The constraint that is broken, or the error."""
    changes: tuple[Change, ...]


def make_row(trials: Trials, number: int) -> Row:
    """A trial as it stands on disk."""
    record, reading = trials.record(number), trials.reading(number)
    if reading is None or missing(reading, trials.sweep):
        step, metrics, note = 0, {}, record.error
    else:
        step, metrics = reading.step, reading.values
        note = record.error or broken(reading, trials.sweep.constraints)
    feasible = bool(metrics) and not note
    return Row(trials.name(number), record.keys, record.status, step, metrics, feasible, note, record.changes)


def make_rows(trials: Trials) -> list[Row]:
    """All trials."""
    return [make_row(trials, number) for number in trials.numbers]


def best_of(rows: Sequence[Row], trials: Trials) -> Row | None:
    """The best finished trial that keeps the constraints; of equal ones the first."""
    sweep = trials.sweep
    values = {
        row.name: value_for(row.metrics[sweep.metric], sweep.mode)
        for row in rows
        if row.feasible and row.status == "finished"
    }
    name = max(values, key=lambda name: values[name], default=None)
    return next((row for row in rows if row.name == name and values[row.name] > WORST), None)


def front_of(rows: Sequence[Row], trials: Trials) -> list[Row]:
    """The finished feasible trials that no other one beats in both objectives of `pareto`; none without it."""
    axes = trials.sweep.pareto
    if axes is None:
        return []
    shown = [row for row in rows if row.feasible and row.status == "finished"]
    nothing = math.nan
    points = [
        (row.metrics.get(axes.x.metric, nothing), row.metrics.get(axes.y.metric, nothing)) for row in shown
    ]
    return [shown[index] for index in pareto_front(points, (axes.x.mode, axes.y.mode))]


def write_table(trials: Trials) -> list[Row]:
    """sweep.json in the sweep's folder, whole or as it was before; returns its rows."""
    rows = make_rows(trials)
    best = best_of(rows, trials)
    content = {
        "metric": trials.sweep.metric,
        "mode": trials.sweep.mode,
        "best": best.name if best else None,
        "front": [row.name for row in front_of(rows, trials)],
        "trials": [asdict(row) for row in rows],
    }
    trials.folder.write_text(json.dumps(content, indent=1) + "\n", TABLE)
    return rows


def shown_metrics(trials: Trials) -> list[str]:
    """The metrics that a person compares: the sweep's, the constraints', the trade-off's."""
    sweep, axes = trials.sweep, trials.sweep.pareto
    names = [sweep.metric, *(bound.metric for bound in sweep.constraints)]
    if axes is not None:
        names += [axes.x.metric, axes.y.metric, *([axes.color] if axes.color else [])]
    return list(dict.fromkeys(names))


def as_text(rows: Sequence[Row], trials: Trials) -> str:
    """The table for a terminal; `*` marks the best, `+` the front."""
    best, front = best_of(rows, trials), {row.name for row in front_of(rows, trials)}
    names = shown_metrics(trials)
    cells = [["", "trial", "status", "step", *names, "keys", ""]]
    for row in rows:
        mark = "*" if best and row.name == best.name else "+" if row.name in front else ""
        values = [f"{row.metrics[name]:.4g}" if name in row.metrics else "-" for name in names]
        cells.append([mark, row.name, row.status, str(row.step), *values, keys_text(row.keys), row.note])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
