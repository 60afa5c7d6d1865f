"""Stacked bars as inline SVG: how a whole divides into parts, step by step; colours come from the page's style sheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from fmray.pipeline.charts import BOTTOM, COLORS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, grid, number

Bar = tuple[float, tuple[float, ...]]
"""Where it stands, and the height of each part, none below 0."""


def stacked_chart(parts: Sequence[str], bars: Sequence[Bar], x_label: str, y_label: str) -> str:
    """An SVG element; its description for screen readers names each part's mean."""
    places = [place for place, _ in bars] or [0.0]
    width = (max(places) - min(places)) / (len(bars) - 1) if len(bars) > 1 else 1.0
    x = Axis(min(places) - width / 2, max(places) + width / 2, LEFT, WIDTH - RIGHT)
    y = Axis(0.0, max((sum(heights) for _, heights in bars), default=1.0) or 1.0, HEIGHT - BOTTOM, TOP)
    means = [f"{name} {number(mean)}" for name, mean in zip(parts, part_means(parts, bars), strict=True)]
    description = escape(f"{y_label} over {x_label}, on average: {', '.join(means)}")
    body = "".join([*grid(x, y), *(part for bar in bars for part in _bar(bar, parts, width, x, y))])
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}">{body}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="2" y="14">{escape(y_label)}</text></svg>'
    )


def part_means(parts: Sequence[str], bars: Sequence[Bar]) -> list[float]:
    """The mean height of each part over the bars."""
    return [sum(heights[i] for _, heights in bars) / (len(bars) or 1) for i in range(len(parts))]


def _bar(bar: Bar, parts: Sequence[str], width: float, x: Axis, y: Axis) -> Iterator[str]:
    place, heights = bar
    left, right = x.at(place - 0.42 * width), x.at(place + 0.42 * width)
    below = 0.0
    for index, (name, height) in enumerate(zip(parts, heights, strict=True)):
        top, bottom = y.at(below + height), y.at(below)
        tip = escape(f"{name}: {number(height)} at {number(place)}")
        yield (
            f'<rect class="fill-{index % COLORS}" x="{left:.1f}" width="{right - left:.1f}" y="{top:.1f}" '
            f'height="{bottom - top:.1f}"><title>{tip}</title></rect>'
        )
        below += height
