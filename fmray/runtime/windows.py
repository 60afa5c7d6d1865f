"""How much of what was admitted in the last minute, name by name: the arithmetic of rate limits, without clock or network."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

MINUTE = 60.0
SLOT = 0.25
"""Seconds of one slot: admissions are remembered by slot, so that a name costs at most some 250 numbers."""
MOST_NAMES = 100_000
"""Names that are remembered; beyond it the ones that asked longest ago are forgotten (many addresses, no keys)."""


@dataclass(frozen=True, slots=True)
class Grant:
    """`Grant(granted=8, left=92, wait=0.0, reset=60.25, slot=4711)`"""

    granted: int
    """How many may be admitted now; 0: none."""
    left: int
    """How many more there are in this minute."""
    wait: float
    """Seconds until what was needed will be free; 0.0 where it was granted, infinite where it exceeds the limit."""
    reset: float
    """Seconds until the whole limit is free, if nobody asks meanwhile."""
    slot: int = 0
    """Where it was noted: what is given back is given back there."""


@dataclass(slots=True)
class _Window:
    """The admissions of one name."""

    slots: deque[list[int]] = field(default_factory=deque)
    """Pairs of slot number and count, in order of time."""
    total: int = 0

    def give_back(self, slot: int, count: int) -> None:
        """To its own slot: anywhere later, and an admission that did happen would be forgotten too soon."""
        for entry in reversed(self.slots):
            if entry[0] == slot:
                returned = min(count, entry[1])
                entry[1] -= returned
                self.total -= returned
            if entry[0] <= slot:
                return


class Windows:
    """Sliding windows: at most `limit` admissions of a name in any 60 seconds, to the last one.

    A token bucket of the same size and pace would let twice the limit through in its first minute. An admission at time t
    is remembered for 60 seconds + `lease` + at most one slot: what is granted now may be spent until `lease` seconds
    later, and must not share a minute with what is granted after it is forgotten. The price is the sustained rate,
    60 / (60 + lease + slot) of the limit: 98 % with `lease` = 1.
    """

    def __init__(self, *, lease: float = 0.0) -> None:
        self._kept = math.ceil((MINUTE + lease) / SLOT)
        self._windows: dict[str, _Window] = {}

    def take(
        self, name: str, limit: int, need: int, want: int, now: float, back: Sequence[tuple[int, int]] = ()
    ) -> Grant:
        """Between `need` and `want` of `name`'s admissions, or none; `now` in seconds, never going back.

        What goes beyond `need` is at most a quarter of what is left, so that one who asks does not starve the others.
        `back`: slots of earlier grants, and how much of each was never spent.
        """
        slot = int(now / SLOT)
        window = self._windows.pop(name, None) or _Window()
        self._windows[name] = window  # at the end: the dict is in order of the last question
        while window.slots and window.slots[0][0] + self._kept < slot:
            window.total -= window.slots.popleft()[1]
        for given, count in back:
            window.give_back(given, count)
        free = limit - window.total
        granted = max(need, min(want, free // 4)) if need <= free else 0
        if granted:
            window.total += granted
            if window.slots and window.slots[-1][0] == slot:
                window.slots[-1][1] += granted
            else:
                window.slots.append([slot, granted])
        wait = 0.0 if granted or not need else self._wait(window, limit, need, now)
        reset = self._free_at(window.slots[-1][0]) - now if window.slots else 0.0
        self._forget(slot)
        return Grant(granted, max(0, limit - window.total), wait, reset, slot)

    def __len__(self) -> int:
        return len(self._windows)

    def _free_at(self, slot: int) -> float:
        """When a slot's admissions are forgotten."""
        return (slot + self._kept + 1) * SLOT

    def _wait(self, window: _Window, limit: int, need: int, now: float) -> float:
        if need > limit:
            return math.inf
        total = window.total
        for slot, count in window.slots:
            total -= count
            if total + need <= limit:
                return self._free_at(slot) - now
        return 0.0

    def _forget(self, slot: int) -> None:
        """Up to two names that have nothing left to remember, or that are too many."""
        for _ in range(2):
            name = next(iter(self._windows))
            window = self._windows[name]
            stale = not window.slots or window.slots[-1][0] + self._kept < slot
            if len(self._windows) == 1 or (not stale and len(self._windows) <= MOST_NAMES):
                return
            del self._windows[name]
