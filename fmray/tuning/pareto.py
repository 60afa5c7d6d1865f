"""The trade-offs that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Mode = Literal["max", "min"]


def pareto_front(points: Sequence[Sequence[float]], modes: Sequence[Mode]) -> list[int]:
    """Indices, in order, of the points that no other point dominates.

    Points [N][K]; modes [K]. One dominates another if it is at least as good in every objective and better in one, so
    equal points stand together. A point with a value that is not finite is never in the front and dominates nothing.
    """
    signs = [1.0 if mode == "max" else -1.0 for mode in modes]
    better = {
        index: tuple(sign * value for sign, value in zip(signs, point, strict=True))
        for index, point in enumerate(points)
        if all(math.isfinite(value) for value in point)
    }
    return [
        index
        for index, point in better.items()
        if not any(_dominates(other, point) for other in better.values())
    ]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether a is nowhere worse than b and somewhere better; larger is better."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))
