"""An answer's text as it can be told: held back where it may become a stop sequence, and ended where it has."""

from __future__ import annotations

from collections.abc import Sequence


class Telling:
    """The text of one answer. `Telling(["\\n", "END"])`; each stop is at least one character long."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """A stop sequence has come: nothing behind it is told, and neither is it."""

    def add(self, text: str) -> str:
        """What can be told now that this has been said."""
        if self.stopped:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            told, self._held, self.stopped = self._held[: min(places)], "", True
            return told
        told = self._held[: len(self._held) - self._beginning()]
        self._held = self._held[len(told) :]
        return told

    def end(self) -> str:
        """What was held back, once nothing more comes."""
        told, self._held = self._held, ""
        return told

    def _beginning(self) -> int:
        """Length of the longest end of what is held that a stop sequence begins with."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
