"""What a served model is: prepare (CPU), forward (model only), finish (CPU); and the threads it runs in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

Ask = TypeVar("Ask", contravariant=True)
Inputs = TypeVar("Inputs")
Outputs = TypeVar("Outputs")
Reply = TypeVar("Reply")
Value = TypeVar("Value")

Kind = Literal["clip", "vqa", "mllm"]
KINDS: dict[Kind, str] = {
    "clip": "a dual encoder (CLIP)",
    "vqa": "a VQA model",
    "mllm": "a multimodal LLM",
}
"""Kinds of models, as a person is told of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a client may know of any model.

    `Capabilities(kind="vqa", modalities=("text", "image"), output="text", max_tokens=32, image_size=96)`
    """

    kind: Kind
    modalities: tuple[str, ...]
    """What it reads."""
    output: Literal["embedding", "text"]
    """What it makes of that."""
    max_tokens: int
    """Tokens of a text, or of a whole conversation."""
    image_size: int
    """Side of the square that a picture becomes."""


class ServingEngine(Protocol[Ask, Inputs, Outputs, Reply]):
    """A model behind an endpoint. HTTP knows these verbs only; a batcher can stand between the first two."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def max_batch(self) -> int:
        """Asks that `forward` takes at once; a longer request is cut."""
        ...

    def warmup(self) -> None:
        """One synthetic ask all the way through; raises CheckpointError where the model cannot answer it."""
        ...

    def prepare(self, asks: Sequence[Ask]) -> Inputs:
        """Decode and tokenise, on the CPU, in any thread; raises RequestError that names the ask."""
        ...

    def forward(self, inputs: Inputs) -> Outputs:
        """The model alone, on its device, one call at a time."""
        ...

    def finish(self, outputs: Outputs) -> list[Reply]:
        """One reply per ask, in order, on the CPU, in any thread."""
        ...


# ----------------------------------------------------------------------------------------- off the event loop


RunAsk = TypeVar("RunAsk")
RunReply = TypeVar("RunReply")


class EngineRunner(Generic[RunAsk, RunReply]):
    """Answers asks without blocking the event loop: CPU work in a pool, the model in one thread of its own.

    One thread, not a lock: torch keeps a team of OpenMP threads per calling thread, and a second team would
    only compete for the same cores. A batcher with the same `answer` can take this class's place.
    """

    def __init__(self, engine: ServingEngine[RunAsk, Any, Any, RunReply]) -> None:
        self.engine = engine
        self._cpu = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1), thread_name_prefix="prepare")
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")

    async def answer(self, asks: Sequence[RunAsk]) -> list[RunReply]:
        """One reply per ask, in order; raises RequestError. Long requests are cut: others get a turn."""
        loop, engine = asyncio.get_running_loop(), self.engine
        replies: list[RunReply] = []
        for start in range(0, len(asks), engine.max_batch):
            inputs = await self.on_cpu(engine.prepare, asks[start : start + engine.max_batch])
            outputs = await loop.run_in_executor(self._device, engine.forward, inputs)
            replies += await self.on_cpu(engine.finish, outputs)
        return replies

    async def on_cpu(self, work: Callable[..., Value], *arguments: Any) -> Value:
        """Any CPU work of a request, in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._cpu, work, *arguments)

    def close(self) -> None:
        """End the threads; what was asked and has not started is dropped."""
        for pool in (self._cpu, self._device):
            pool.shutdown(wait=False, cancel_futures=True)
