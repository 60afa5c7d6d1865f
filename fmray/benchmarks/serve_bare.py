"""The engine without an endpoint around it: a process that answers questions, run as `python -m fmray.benchmarks.serve_bare`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from fmray.benchmarks.open_clip_side.answering import answer_questions
from fmray.config.base import RuntimeConfig
from fmray.config.serving import ServeConfig
from fmray.serving.asks import ImageAsk
from fmray.serving.clip_engine import ClipEngine
from fmray.serving.opening import open_engine


class BareEngine:
    """What the questions are put to."""

    engine: ClipEngine
    asks: list[ImageAsk]

    def prepare(self, model: str, pictures: str, core: int | None) -> int:
        """Load both, on a core, with one thread; how many items a full batch has."""
        if core is not None:
            os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        config = ServeConfig(checkpoint=model, runtime=RuntimeConfig(device="cpu", threads=1))
        engine = open_engine(model, config)
        assert isinstance(engine, ClipEngine)
        self.engine = engine
        files = sorted(Path(pictures).iterdir())
        self.asks = [ImageAsk(file.read_bytes(), file.name) for file in files]
        return engine.max_batch

    def batches(self, count: int) -> float:
        """Pictures a second: `count` of them decoded one after the other, in full batches through the model."""
        engine, started = self.engine, time.perf_counter()
        for first in range(0, count, engine.max_batch):
            asks = [self._ask(number) for number in range(first, min(first + engine.max_batch, count))]
            engine.forward(engine.collate([engine.prepare(ask).value for ask in asks]))
        return count / (time.perf_counter() - started)

    def singles(self, count: int) -> list[float]:
        """Seconds of each: one picture decoded and through the model by itself."""
        engine, taken = self.engine, []
        for number in range(count):
            started = time.perf_counter()
            engine.forward(engine.collate([engine.prepare(self._ask(number)).value]))
            taken.append(time.perf_counter() - started)
        return taken

    def _ask(self, number: int) -> ImageAsk:
        return self.asks[number % len(self.asks)]


def main() -> None:
    """Answer until standard input ends."""
    side = BareEngine()
    answers: dict[str, Any] = {name: getattr(side, name) for name in ("prepare", "batches", "singles")}
    answer_questions(answers)


if __name__ == "__main__":
    main()
