"""Line charts as inline SVG: no library, no script; colours come from the page's style sheet (`line-0` …)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

WIDTH, HEIGHT = 520, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 30, 44
COLORS = 6
DOTS_UP_TO = 40
"""Lines with no more points than this show each one, with its numbers as a tooltip."""


@dataclass(frozen=True, slots=True)
class Line:
    """One named series. `Line("R@5", ((25, 0.31), (50, 0.44)))`; a value that is not finite is a gap."""

    name: str
    points: tuple[tuple[float, float], ...]

    @property
    def finite(self) -> list[tuple[float, float]]:
        return [point for point in self.points if math.isfinite(point[1])]


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` on the pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def number(value: float) -> str:
    """`0.0003`, `12.5`, `1500`, `2e-06`: four digits (more for whole numbers), no trailing zeros."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e7 else f"{value:.4g}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1; steps of {1, 2, 2.5, 5}·10^k, but not 2.5: steps are counted."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    factors = (1, 2, 5, 10, 20) if power == 1 else (1, 2, 2.5, 5, 10, 20)
    step = next(power * m for m in factors if (high - low) / (power * m) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def span(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    """Lowest and highest value, never equal; `from_zero` takes in 0."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low, high = (min(low, 0.0), max(high, 0.0)) if from_zero else (low, high)
    return (low, high) if high > low else (low, low + (abs(low) * 0.1 or 1.0))


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, *, from_zero: bool = False) -> str:
    """An SVG element; its description for screen readers names each line's last value."""
    points = [point for line in lines for point in line.finite]
    x = Axis(*span([p[0] for p in points]), LEFT, WIDTH - RIGHT)
    low, high = span([p[1] for p in points], from_zero=from_zero)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP)
    summary = "; ".join(f"{line.name} ends at {number(line.finite[-1][1])}" for line in lines if line.finite)
    body = "".join(
        [*grid(x, y), *(part for i, line in enumerate(lines) for part in _line(line, i % COLORS, x, y))]
    )
    description = escape(f"{y_label} over {x_label}: {summary or 'no values'}")
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{description}">{body}'
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="2" y="14">{escape(y_label)}</text></svg>'
    )


def grid(x: Axis, y: Axis) -> Iterator[str]:
    """Horizontal rules, the axis, and the numbers along both."""
    for value in ticks(y.low, y.high):
        at = f"{y.at(value):.1f}"
        yield f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at}" y2="{at}"/>'
        yield f'<text x="{LEFT - 6}" y="{at}" dy="0.32em" text-anchor="end">{number(value)}</text>'
    for value in ticks(x.low, x.high):
        at = f"{x.at(value):.1f}"
        yield f'<text x="{at}" y="{y.start + 17:.1f}" text-anchor="middle">{number(value)}</text>'
    yield f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}"/>'


def _line(line: Line, color: int, x: Axis, y: Axis) -> Iterator[str]:
    for finite, run in groupby(line.points, key=lambda point: math.isfinite(point[1])):
        if finite:
            path = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in run)
            yield f'<polyline class="line line-{color}" points="{path}"/>'
    if len(line.finite) <= DOTS_UP_TO:
        for px, py in line.finite:
            tip = escape(f"{line.name}: {number(py)} at {number(px)}")
            at = f'cx="{x.at(px):.1f}" cy="{y.at(py):.1f}"'
            yield f'<circle class="dot line-{color}" {at} r="3"><title>{tip}</title></circle>'
