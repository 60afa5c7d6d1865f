"""The front against its definition and closed forms."""

from __future__ import annotations

import math
from random import Random

import pytest

from fmray.tuning.pareto import Mode, pareto_front


def test_a_staircase() -> None:
    points = [(1, 5), (2, 4), (3, 3), (2, 2), (3, 1), (0, 5)]
    assert pareto_front(points, ("max", "max")) == [0, 1, 2]
    assert pareto_front(points, ("min", "min")) == [3, 4, 5]
    assert pareto_front(points, ("max", "min")) == [4]
    assert pareto_front(points, ("min", "max")) == [5]


def test_one_objective_is_the_best_and_its_equals() -> None:
    assert pareto_front([(1,), (3,), (2,), (3,)], ("max",)) == [1, 3]


def test_equal_points_stand_together_and_a_tie_in_one_axis_decides_by_the_other() -> None:
    assert pareto_front([(1, 1), (1, 1)], ("max", "max")) == [0, 1]
    assert pareto_front([(1, 1), (1, 2)], ("max", "max")) == [1]


def test_what_is_not_finite_neither_wins_nor_beats() -> None:
    points = [(math.nan, 9), (math.inf, 9), (1, 1), (9, math.nan)]
    assert pareto_front(points, ("max", "max")) == [2]
    assert pareto_front([], ("max", "max")) == []


@pytest.mark.parametrize("modes", [("max", "min", "max"), ("min", "min", "min")])
def test_it_is_the_definition(modes: tuple[Mode, ...]) -> None:
    random = Random(0)
    points = [tuple(random.randint(0, 4) for _ in modes) for _ in range(60)]
    signs = [1 if mode == "max" else -1 for mode in modes]

    def beats(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        gains = [sign * (x - y) for sign, x, y in zip(signs, a, b, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    expected = [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
    assert pareto_front(points, modes) == expected
    assert 0 < len(expected) < len(points)
