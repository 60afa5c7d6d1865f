"""Points in a plane as inline SVG: two metrics, a third as colour, the ones that nothing beats joined by a line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from fmray.pipeline.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, grid, number, span


@dataclass(frozen=True, slots=True)
class Point:
    """One thing that was measured. `Point("trial-00003", 0.61, 0.72, color=4.2, front=True)`."""

    name: str
    x: float
    y: float
    color: float | None = None
    """The third number; None: drawn without colour."""
    front: bool = False
    """Nothing is better in both: ringed, and joined to its neighbours."""
    good: bool = True
    """False: it breaks a constraint, and is drawn as a cross."""


def scatter_chart(points: Sequence[Point], x_label: str, y_label: str, color_label: str = "") -> str:
    """An SVG element; points with a coordinate that is not finite are left out. Its description names the front."""
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    x = Axis(*padded([point.x for point in shown]), LEFT, WIDTH - RIGHT)
    y = Axis(*padded([point.y for point in shown]), HEIGHT - BOTTOM, TOP)
    low, high = color_span(shown)
    front = sorted((point for point in shown if point.front), key=lambda point: point.x)
    body = "".join(
        [*grid(x, y), _front(front, x, y), *(part for p in shown for part in _point(p, x, y, low, high))]
    )
    names = ", ".join(point.name for point in front) or "none"
    description = escape(f"{y_label} over {x_label}: {len(shown)} points; not beaten: {names}")
    scale = f"; colour: {color_label} from {number(low)} to {number(high)}" if color_label else ""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}{escape(scale)}">{body}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="2" y="14">{escape(y_label)}</text></svg>'
    )


def color_span(points: Sequence[Point]) -> tuple[float, float]:
    """The palest and the strongest colour's numbers."""
    return span([p.color for p in points if p.color is not None and math.isfinite(p.color)])


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Their span with a margin, so that no point lies on the frame."""
    low, high = span(values)
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _front(front: Sequence[Point], x: Axis, y: Axis) -> str:
    path = " ".join(f"{x.at(point.x):.1f},{y.at(point.y):.1f}" for point in front)
    return f'<polyline class="front" points="{path}"/>' if len(front) > 1 else ""


def _point(point: Point, x: Axis, y: Axis, low: float, high: float) -> Iterator[str]:
    at_x, at_y = x.at(point.x), y.at(point.y)
    third = "" if point.color is None else f", {number(point.color)}"
    tip = f"<title>{escape(point.name)}: {number(point.x)}, {number(point.y)}{third}</title>"
    if not point.good:
        cross = f"M{at_x - 4:.1f} {at_y - 4:.1f}l8 8m0 -8l-8 8"  # two strokes, corner to corner of 8 pixels
        yield f'<path class="cross" d="{cross}">{tip}</path>'
        return
    known = point.color is not None and math.isfinite(point.color)
    share = (point.color - low) / (high - low) if point.color is not None and known else 0.0
    kind = f"point{' unbeaten' if point.front else ''}{'' if known else ' plain'}"
    yield f'<circle class="{kind}" style="--share:{share:.3f}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="6">{tip}</circle>'
