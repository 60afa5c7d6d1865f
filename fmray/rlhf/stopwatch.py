"""How long each phase took, and what the samples were."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fmray.rlhf.experience import Judged
from fmray.rlhf.records import Rollouts
from fmray.rlhf.rewards import Judgement
from fmray.types import Metrics


@dataclass(slots=True)
class Stopwatch:
    """`watch = Stopwatch(); …; watch.lap("act")`"""

    _mark: float = field(default_factory=time.perf_counter)
    _laps: dict[str, float] = field(default_factory=dict)

    def lap(self, phase: str) -> None:
        """The time since the last lap was this phase's."""
        now = time.perf_counter()
        self._laps[phase], self._mark = now - self._mark, now

    def metrics(self, rollouts: Rollouts) -> Metrics:
        """Seconds per phase, samples and response tokens per second of the whole iteration."""
        whole = sum(self._laps.values())
        return {f"time/{phase}": seconds for phase, seconds in self._laps.items()} | {
            "time/step": whole,
            "train/samples_per_second": len(rollouts) / whole,
            "train/tokens_per_second": rollouts.tokens / whole,
        }


def sample_rows(judged: Judged, judgement: Judgement, count: int) -> list[dict[str, Any]]:
    """The first samples as a table: prompt, response, picture and answers of a question, every raw reward, the combined score."""
    rows: list[dict[str, Any]] = []
    for index in range(min(count, len(judged.rollouts))):
        row = {
            name: ", ".join(dict.fromkeys(value)) if isinstance(value, list) else value
            for name, value in judged.rollouts.told(index).items()
        }
        row["score"] = round(judgement.scores_B[index].item(), 3)
        row |= {name: round(raw_B[index].item(), 3) for name, raw_B in judged.raw.items()}
        rows.append(row)
    return rows
