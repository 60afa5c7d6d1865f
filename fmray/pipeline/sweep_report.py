"""A sweep's page: its trials as a table, the trade-off, how the metric went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fmray.config.loading import dump_json
from fmray.pipeline.charts import Line, number
from fmray.pipeline.report import render
from fmray.pipeline.scatter import Point
from fmray.pipeline.sections import Code, LineChart, Report, ScatterChart, Section, Table, Tile
from fmray.tuning.readings import value_for
from fmray.tuning.table import Row, best_of, front_of, shown_metrics
from fmray.tuning.trials import Trials, keys_text

PAGE = "sweep.html"
CURVES = 6
"""So many trials can be told apart by their lines."""


def write_sweep_report(rows: Sequence[Row], trials: Trials) -> str:
    """sweep.html in the sweep's folder, one file that needs nothing else; returns its address."""
    sweep = trials.sweep
    sections: list[Section] = [table(rows, trials), *curves(rows, trials)]
    if sweep.pareto is not None:
        sections.insert(0, trade_off(rows, trials))
    if moves := changes(rows):
        sections.append(moves)
    sections.append(Code("Resolved configuration", dump_json(sweep)))
    place = "one after the other" if sweep.runtime.kind == "local" else "Ray Tune"
    subtitle = (
        f"{len(rows)} trials of {sweep.recipe or sweep.root}, {place}, scheduler {sweep.scheduler.kind}"
    )
    report = Report(f"fmray sweep: {sweep.run.name}", subtitle, tiles(rows, trials), tuple(sections))
    trials.folder.write_text(render(report), PAGE)
    return str(Path(trials.folder.url) / PAGE) if trials.folder.is_local else f"{trials.folder.url}/{PAGE}"


def tiles(rows: Sequence[Row], trials: Trials) -> tuple[Tile, ...]:
    """The numbers to see first."""
    best, sweep = best_of(rows, trials), trials.sweep
    counts = {
        status: sum(row.status == status for row in rows) for status in ("finished", "stopped", "failed")
    }
    beyond = sum(bool(row.note) and row.status != "failed" for row in rows)
    found = [
        Tile(
            f"Best {sweep.metric}", number(best.metrics[sweep.metric]), f"{best.name}: {keys_text(best.keys)}"
        )
        if best
        else Tile(f"Best {sweep.metric}", "none", "no finished trial keeps the constraints")
    ]
    ended = ", ".join(f"{many} {status}" for status, many in counts.items() if many and status != "finished")
    found.append(Tile("Trials finished", f"{counts['finished']} of {len(rows)}", ended))
    if sweep.constraints:
        found.append(Tile("Beyond a constraint", str(beyond), "never the best"))
    return tuple(found)


def table(rows: Sequence[Row], trials: Trials) -> Table:
    """Every trial with its keys and the metrics that are compared, the best first."""
    sweep, names, keys = trials.sweep, shown_metrics(trials), list(trials.sweep.space)
    best, front = best_of(rows, trials), {row.name for row in front_of(rows, trials)}

    def rank(row: Row) -> tuple[bool, float]:
        value = row.metrics.get(sweep.metric, float("nan"))
        return not (row.feasible and row.status == "finished"), -value_for(value, sweep.mode)

    cells: list[tuple[str | float, ...]] = []
    for row in sorted(rows, key=rank):
        mark = "best" if best and row.name == best.name else "unbeaten" if row.name in front else ""
        values = [row.metrics.get(name, "–") for name in names]
        drawn = [v if isinstance(v := row.keys[key], int | float) else str(v) for key in keys]
        cells.append((row.name, mark, row.status, row.step, *values, *drawn, row.note))
    columns = ("trial", "", "status", "step", *names, *keys, "note")
    return Table("Trials", columns, tuple(cells), wide=True)


def trade_off(rows: Sequence[Row], trials: Trials) -> ScatterChart:
    """The two objectives against each other."""
    axes, front = trials.sweep.pareto, {row.name for row in front_of(rows, trials)}
    assert axes is not None
    points = tuple(
        Point(
            f"{row.name} ({keys_text(row.keys)})",
            row.metrics[axes.x.metric],
            row.metrics[axes.y.metric],
            row.metrics.get(axes.color) if axes.color else None,
            front=row.name in front,
            good=row.feasible,
        )
        for row in rows
        if axes.x.metric in row.metrics and axes.y.metric in row.metrics
    )
    ends = {"max": "more is better", "min": "less is better"}
    note = f"{axes.x.metric}: {ends[axes.x.mode]}; {axes.y.metric}: {ends[axes.y.mode]}."
    return ScatterChart("Trade-off", points, axes.x.metric, axes.y.metric, axes.color or "", note)


def curves(rows: Sequence[Row], trials: Trials) -> list[LineChart]:
    """How the compared metrics went, of the trials that got best."""
    sweep = trials.sweep
    ranked = sorted(
        (row for row in rows if row.metrics),
        key=lambda row: -value_for(row.metrics[sweep.metric], sweep.mode),
    )[:CURVES]
    reports = {row.name: trials.home(trials.number(row.name)).metrics() for row in ranked}
    charts = []
    for metric in shown_metrics(trials):
        lines = tuple(
            Line(name, tuple((line["step"], line[metric]) for line in lines if metric in line))
            for name, lines in reports.items()
        )
        if any(len(line.finite) > 1 for line in lines):
            note = f"The {len(ranked)} best trials." if len(rows) > CURVES else ""
            charts.append(LineChart(metric, lines, "step", metric, note=note))
    return charts


def changes(rows: Sequence[Row]) -> Table | None:
    """Which trials went on from another's checkpoint (pbt)."""
    moves = tuple(
        (row.name, change.step, change.donor, keys_text(change.keys))
        for row in rows
        for change in row.changes
    )
    note = "Trials that went on from a better one's checkpoint, and the keys they went on with."
    return Table("Exploits", ("trial", "step", "from", "keys"), moves, note, wide=True) if moves else None
