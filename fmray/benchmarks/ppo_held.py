"""`python -m fmray.benchmarks.ppo_held CONFIG`: a PPO run that does one iteration each time it is asked for one.

It is `train_ppo` itself, in the main thread as always, held in a reporter at the end of every iteration.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fmray.benchmarks.open_clip_side.answering import conversation
from fmray.config.rlhf import RlhfConfig
from fmray.rlhf.loop import train_ppo
from fmray.rlhf.roles import pool_plan
from fmray.runtime.context import WorkerContext, prepare_process
from fmray.runtime.metrics import Reporter, make_reporters
from fmray.runtime.pool import LocalPools
from fmray.runtime.run_folder import RunFolder
from fmray.types import Metrics

CPU = torch.device("cpu")


class _Enough(Exception):
    """No more iterations are wanted."""


class Hold:
    """A reporter that answers the question for an iteration with how it went, and waits for the next question."""

    def __init__(self, questions: Iterator[dict[str, Any]], answer: Callable[[Any], None]) -> None:
        self._questions, self._answer = questions, answer
        self._started = 0.0

    def wait(self) -> None:
        """Until the next iteration is asked for; then its time begins."""
        if next(self._questions, None) is None:
            raise _Enough
        self._started = time.perf_counter()

    def __call__(self, step: int, metrics: Metrics) -> None:
        seconds = time.perf_counter() - self._started
        tokens = metrics["train/tokens_per_second"] * metrics["time/step"]
        self._answer({**metrics, "seconds": seconds, "tokens": tokens})
        self.wait()


def main() -> None:
    """Answer until standard input ends: each iteration's seconds, from the end of the one before, response tokens, metrics.

    The first one's seconds hold the building of everything.
    """
    config = RlhfConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with conversation() as talk:
        prepare_process(config.runtime)
        folder = RunFolder.of(config.run)
        hold = Hold(*talk)
        reporters: list[Reporter] = [*make_reporters(config.report, folder, config.run.name), hold]
        context = WorkerContext(0, 1, CPU, folder, LocalPools(pool_plan(config), CPU), reporters)
        try:
            hold.wait()
            train_ppo(config, context)
        except _Enough:
            return


if __name__ == "__main__":
    main()
