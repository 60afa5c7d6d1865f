"""What whoever starts a run may want of it on the way: to hear its reports, to end it early, to change a key of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from fmray.runtime.run_folder import RunFolder
from fmray.types import Metrics

STOP_POLL_SECONDS = 0.5


def _ignore(_step: int, _metrics: Metrics) -> None:
    """Nobody listens."""


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Oversight:
    """`launch(work, config, oversight=Oversight(stop=lambda: enough))`; the run saves and ends once `stop()` is true."""

    tell: Callable[[int, Metrics], None] = _ignore
    """Hears each report: in local mode as it is made, on Ray from the run's metrics.jsonl, at most half a second later."""
    stop: Callable[[], bool] = _never
    """Asked at every step, as the run's `stop` file is."""
    may_change: tuple[str, ...] = ()
    """Dotted keys or sections that this start may have otherwise than the run it resumes (`optimizer.lr`)."""


NO_OVERSIGHT = Oversight()


def stop_file(folder: RunFolder) -> Callable[[], bool]:
    """Whether somebody left a `stop` file in the folder; looks at the storage at most twice a second."""
    seen = {"at": float("-inf"), "asked": False}

    def asked() -> bool:
        now = time.monotonic()
        if not seen["asked"] and now - seen["at"] >= STOP_POLL_SECONDS:
            seen["at"], seen["asked"] = now, folder.exists("stop")
        return bool(seen["asked"])

    return asked
