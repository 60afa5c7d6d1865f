"""Sections of the page of a model that answers with pictures: how it decided, whether the picture was right, what came back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fmray.data.dialogues import DialogueSource
from fmray.pipeline.charts import Line
from fmray.pipeline.sections import Answer, Bars, Exhibit, Gallery, LineChart, Section, Table, Tile

KINDS = {"picture": "asked for by name", "again": "asked for by a picture"}
"""Requests for pictures in words, as far as they have some."""


def replies_tiles(evaluation: Mapping[str, Any]) -> tuple[Tile, ...]:
    """The numbers to see first."""
    metrics, count = evaluation["metrics"], evaluation["replies"]["pictures"]
    tiles = [
        Tile(
            "Right decisions", f"{metrics['eval/routing']:.3f}", f"{evaluation['questions']:,} test requests"
        )
    ]
    for kind in wanted_kinds(evaluation):
        note = f"{count} pictures; the dual encoder alone {metrics[f'eval/replies/{kind}/ceiling/r5']:.3f}"
        value = f"{metrics[f'eval/replies/{kind}/r5']:.3f}"
        tiles.append(Tile(f"R@5, {KINDS.get(kind, kind)}", value, note))
    if "eval/exact_match" in metrics:
        tiles.append(Tile("Exact match", f"{metrics['eval/exact_match']:.3f}", "requests for words"))
    return tuple(tiles)


def replies_sections(
    evaluation: Mapping[str, Any], reports: Sequence[Mapping[str, Any]], source: DialogueSource
) -> list[Section]:
    """Decisions by kind of request, places of the right picture, and requests with what came back."""
    metrics, replies = evaluation["metrics"], evaluation["replies"]
    sections: list[Section] = [*_curve(reports)]
    rows = tuple(
        (
            row["kind"],
            row["wants"],
            row["requests"],
            row["pictures"],
            row["words"],
            round(row["pictures" if row["wants"] == "picture" else "words"] / row["requests"], 3),
            "–" if row["exact_match"] is None else round(row["exact_match"], 3),
        )
        for row in replies["kinds"]
    )
    columns = ("kind", "wants", "requests", "pictures given", "words given", "right decisions", "exact match")
    note = "Neither the things nor the wording of these requests were trained on."
    sections.append(Table("Decisions by kind of request", columns, rows, note))
    for kind in wanted_kinds(evaluation):
        amounts = tuple(
            (f"R@{k}, {name}", 100 * metrics[f"eval/replies/{kind}/{part}r{k}"])
            for k in (1, 5, 10)
            for part, name in (("", "model"), ("ceiling/", "dual encoder's own text"), ("chance/", "chance"))
        )
        mean = metrics[f"eval/replies/{kind}/mean_rank"]
        note = f"Among {replies['pictures']} test pictures; answered with words: last. Mean rank {mean:.1f}."
        sections.append(Bars(f"The right picture, {KINDS.get(kind, kind)}", amounts, "%", note))
    exhibits = tuple(_exhibit(row, source) for row in replies["gallery"])
    if exhibits:
        note = "Test requests, evenly spread, none chosen; the nearest pictures with their cosines, or what was said."
        sections.append(Gallery("What came back", exhibits, note))
    return sections


def wanted_kinds(evaluation: Mapping[str, Any]) -> list[str]:
    """Kinds of requests that a picture answers, as metrics name them."""
    names = (name.removeprefix("eval/replies/") for name in evaluation["metrics"])
    found = [name.removesuffix("/mean_rank") for name in names if name.endswith("/mean_rank")]
    return sorted(
        found, key=lambda kind: (kind not in KINDS, list(KINDS).index(kind) if kind in KINDS else 0)
    )


def _curve(reports: Sequence[Mapping[str, Any]]) -> list[LineChart]:
    keys = {"eval/routing": "right decisions", "eval/replies/picture/r5": "R@5, asked for by name"}
    lines = tuple(
        Line(name, tuple((report["step"], report[key]) for report in reports if key in report))
        for key, name in keys.items()
    )
    chart = LineChart("Decisions and pictures", lines, "step", "share", from_zero=True)
    return [chart] if any(line.finite for line in lines) else []


def _exhibit(row: Mapping[str, Any], source: DialogueSource) -> Exhibit:
    picture = None if row["picture"] is None else source.picture(row["picture"])
    answers = tuple(
        Answer(caption, cosine, caption == row["wants"], source.picture(key))
        for key, cosine, caption in row["returned"]
    )
    if not answers:
        right = not row["wants"] and row["said"].strip().casefold() == row["answer"].strip().casefold()
        answers = (Answer(row["said"] or "(nothing)", float(right), right),)
    badge = "words" if row["rank"] is None else f"rank {row['rank'] + 1}"
    good = row["routed"] and (row["rank"] is None or row["rank"] < len(answers))
    title = row["request"] if not row["wants"] else f"{row['request']} ({row['wants']})"
    return Exhibit(title, picture, answers, badge if row["routed"] else f"{badge}, wrongly", good=good)
