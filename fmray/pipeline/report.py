"""A run's report: one HTML file with everything in it, readable on a phone and in the dark, without a script.

Names, captions and answers come from outside: all text is escaped, pictures are decoded and encoded anew,
and the page's Content-Security-Policy forbids scripts and every load from elsewhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from fmray.config.schema import ImageConfig
from fmray.data.transforms import decode_rgba
from fmray.pipeline.charts import COLORS, line_chart, number
from fmray.pipeline.scatter import color_span, scatter_chart
from fmray.pipeline.sections import (
    Answer,
    Bars,
    Code,
    Exhibit,
    Gallery,
    LineChart,
    Matrix,
    Report,
    Said,
    ScatterChart,
    Section,
    SideBySide,
    StackedChart,
    Table,
    Text,
    Tile,
)
from fmray.pipeline.stacked import part_means, stacked_chart

THUMBNAIL = ImageConfig(size=144, fit="pad")
SHORT = 18
"""Letters of a table's cell that is never broken."""
TEMPLATE = Path(__file__).with_name("report.html")


def write_report(report: Report, path: Path) -> Path:
    """One file, replaced whole. Raises DataError where a picture cannot be decoded, OSError as usual."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(render(report), encoding="utf-8")
    draft.replace(path)
    return path


def render(report: Report) -> str:
    """The page's HTML."""
    parts: list[list[tuple[str, Section]]] = [[]]
    for place, section in enumerate(report.sections):
        if isinstance(section, Text) and parts[-1]:
            parts.append([])
        parts[-1].append((f"s{place}", section))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(report.title),
        subtitle=escape(report.subtitle),
        tiles="".join(_tile(tile) for tile in report.tiles),
        contents="".join(_contents(part) for part in parts),
        sections="\n".join(_part(part) for part in parts),
    )


def _contents(part: list[tuple[str, Section]]) -> str:
    links = "".join(f'<li><a href="#{anchor}">{escape(section.title)}</a></li>' for anchor, section in part)
    return f"<ul>{links}</ul>"


def _part(part: list[tuple[str, Section]]) -> str:
    return f'<div class="part">{"".join(_section(section, anchor) for anchor, section in part)}</div>'


def _tile(tile: Tile) -> str:
    note = f'<p class="note">{escape(tile.note)}</p>' if tile.note else ""
    return f'<div class="tile"><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}{note}</dd></div>'


def _section(section: Section, anchor: str) -> str:
    half = isinstance(section, LineChart | ScatterChart | StackedChart | Bars) or (
        isinstance(section, Table) and not section.wide
    )
    note = "" if isinstance(section, Text | Code) or not section.note else f"<p>{escape(section.note)}</p>"
    body = _BODY[type(section)](section)
    return (
        f'<section id="{anchor}" class="{"half" if half else "full"}" aria-labelledby="{anchor}-title">'
        f'<h2 id="{anchor}-title">{escape(section.title)}</h2>{note}{body}</section>'
    )


def _line_chart(chart: LineChart) -> str:
    names = [
        f'<li><span class="swatch swatch-{i % COLORS}"></span>{escape(line.name)}'
        + (f" <b>{number(line.finite[-1][1])}</b></li>" if line.finite else "</li>")
        for i, line in enumerate(chart.lines)
    ]
    svg = line_chart(chart.lines, chart.x_label, chart.y_label, from_zero=chart.from_zero)
    return f'<ul class="legend">{"".join(names)}</ul>{svg}'


def _scatter(chart: ScatterChart) -> str:
    low, high = (number(end) for end in color_span(chart.points))
    label = escape(chart.color_label)
    marks = [f'<li>{label} {low} <span class="ramp"></span> {high}</li>'] if label else []
    if any(point.front for point in chart.points):
        marks.append('<li><span class="ring"></span> not beaten in both</li>')
    if not all(point.good for point in chart.points):
        marks.append("<li>× breaks a constraint</li>")
    svg = scatter_chart(chart.points, chart.x_label, chart.y_label, chart.color_label)
    return f'<ul class="legend">{"".join(marks)}</ul>{svg}'


def _stacked(chart: StackedChart) -> str:
    marks = [
        f'<li><span class="block block-{i % COLORS}"></span>{escape(name)} <b>{number(mean)}</b></li>'
        for i, (name, mean) in enumerate(zip(chart.parts, part_means(chart.parts, chart.bars), strict=True))
    ]
    svg = stacked_chart(chart.parts, chart.bars, chart.x_label, chart.y_label)
    return f'<ul class="legend">{"".join(marks)}</ul>{svg}'


def _side_by_side(section: SideBySide) -> str:
    return "".join(
        f'<article class="beside"><h3>{escape(prompt)}</h3>'
        + "".join(_said(name, said) for name, said in zip(section.columns, answers, strict=True))
        + "</article>"
        for prompt, answers in section.rows
    )


def _said(column: str, said: Said) -> str:
    scores = "".join(f"<li>{escape(name)} <b>{number(score)}</b></li>" for name, score in said.scores)
    return (
        f'<div class="said"><h4>{escape(column)}</h4><blockquote>{escape(said.text)}</blockquote>'
        f'<ul class="scores">{scores}</ul></div>'
    )


def _gallery(gallery: Gallery) -> str:
    roomy = any(answer.picture is not None for exhibit in gallery.exhibits for answer in exhibit.answers)
    cards = "".join(_exhibit(exhibit) for exhibit in gallery.exhibits)
    return f'<div class="gallery{" roomy" if roomy else ""}">{cards}</div>'


def _exhibit(exhibit: Exhibit) -> str:
    tone = "good" if exhibit.good else "bad"
    badge = f'<span class="badge {tone}">{escape(exhibit.badge)}</span>' if exhibit.badge else ""
    picture = _picture(exhibit.picture, exhibit.title) if exhibit.picture is not None else ""
    answers = "".join(_answer(answer) for answer in exhibit.answers)
    kind = "pictures" if any(answer.picture is not None for answer in exhibit.answers) else "texts"
    head = f"<header>{picture}<h3>{escape(exhibit.title)}</h3>{badge}</header>"
    return f'<article>{head}<ol class="{kind}">{answers}</ol></article>'


def _answer(answer: Answer) -> str:
    mark = '<span class="mark" role="img" aria-label="right">✓</span>' if answer.right else ""
    picture = _picture(answer.picture, answer.text) if answer.picture is not None else ""
    words = f"{picture}{mark}<span class=words>{escape(answer.text)}</span> <small>{answer.score:.2f}</small>"
    return f'<li class="{"right" if answer.right else "other"}">{words}</li>'


def _matrix(matrix: Matrix) -> str:
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in matrix.names)
    rows = []
    for name, counts in zip(matrix.names, matrix.counts, strict=True):
        cells = "".join(_cell(count, count / max(1, sum(counts))) for count in counts)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    corner = '<td class="corner">true class ↓ &nbsp; predicted →</td>'
    return f'<div class="scroll" tabindex="0"><table class="matrix"><tr>{corner}{head}</tr>{"".join(rows)}</table></div>'


def _cell(count: int, share: float) -> str:
    tone = "strong" if share > 0.65 else "weak" if count else "zero"
    return f'<td class="{tone}" style="--share:{share:.3f}">{count or "·"}</td>'


def _table(table: Table) -> str:
    numeric = [
        bool(table.rows) and all(isinstance(row[i], int | float) for row in table.rows)
        for i in range(len(table.columns))
    ]
    kinds = [
        "number" if is_number else "short" if is_short(table, i) else "word"
        for i, is_number in enumerate(numeric)
    ]
    head = "".join(
        f'<th scope="col" class="{k}">{escape(c)}</th>' for k, c in zip(kinds, table.columns, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(f'<td class="{k}">{_value(cell)}</td>' for k, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def is_short(table: Table, column: int) -> bool:
    """Whether all its texts fit on a line beside others, and need not be broken."""
    return all(len(str(text)) <= SHORT for text in (table.columns[column], *(r[column] for r in table.rows)))


def _value(cell: str | float | int) -> str:
    return escape(cell) if isinstance(cell, str) else number(cell)


def _bars(bars: Bars) -> str:
    most = max((amount for _, amount in bars.amounts), default=0.0) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{amount:,.1f} {escape(bars.unit)}</td>'
        f'<td class="bar"><span style="--share:{max(0.0, amount) / most:.3f}"></span></td></tr>'
        for name, amount in bars.amounts
    )
    return f'<table class="bars">{rows}</table>'


def _text(text: Text) -> str:
    return "".join(f"<p>{escape(paragraph)}</p>" for paragraph in text.body.split("\n\n"))


def _code(code: Code) -> str:
    block = f'<pre tabindex="0"><code>{escape(code.code)}</code></pre>'
    if not code.collapsed:
        return block
    lines = len(code.code.splitlines())
    return f"<details><summary>Show {lines} lines</summary>{block}</details>"


_BODY: dict[type, Callable[[Any], str]] = {
    LineChart: _line_chart,
    ScatterChart: _scatter,
    StackedChart: _stacked,
    SideBySide: _side_by_side,
    Gallery: _gallery,
    Matrix: _matrix,
    Table: _table,
    Bars: _bars,
    Text: _text,
    Code: _code,
}


def _picture(data: bytes, name: str) -> str:
    return f'<img src="{_data_uri(data)}" alt="{escape(name)}" width="72" height="72" loading="lazy">'


@cache
def _data_uri(data: bytes) -> str:
    """A thumbnail as WebP; decoding first keeps what is hidden in a file out of the page."""
    rgba_4HW = decode_rgba(data, THUMBNAIL, name="a picture of the report")
    stream = io.BytesIO()
    Image.fromarray(rgba_4HW.permute(1, 2, 0).numpy()).save(stream, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
