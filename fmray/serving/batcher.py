"""Requests that wait become batches: of one bucket, without those whose client has left, and a bad item fails alone.

A request: answer -> prepare (threads, one by one) -> wait in a bucket -> forward (one thread, a batch) -> replies.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

from fmray.config.serving import BatchConfig
from fmray.errors import RequestError
from fmray.serving.admission import CLOSED, Admission
from fmray.serving.engines import BatchEngine, Prepared, is_out_of_memory
from fmray.serving.finished import note_stage
from fmray.serving.metrics import Meters

logger = logging.getLogger(__name__)

Ask = TypeVar("Ask", bound="Weighed")
Reply = TypeVar("Reply")

TOGETHER_BYTES = 16_384
"""Asks that one thread prepares in one go: a hop to a thread costs more than a short text."""
TOGETHER_ASKS = 32


class Weighed(Protocol):
    """An ask that knows what it weighs."""

    @property
    def size(self) -> int:
        """Bytes: an encoded picture's, a text's."""
        ...


@dataclass(frozen=True, slots=True)
class Answered(Generic[Reply]):
    """One reply per ask, in order. `Answered([…], queue_seconds=0.004, infer_seconds=0.031)`"""

    replies: list[Reply]
    queue_seconds: float
    """Longest wait of an item between prepared and the model's first look at it."""
    infer_seconds: float
    """Longest forward pass that held an item."""


@dataclass(slots=True)
class _Waiting:
    """A prepared item in its bucket."""

    prepared: Prepared[Any]
    done: asyncio.Future[Any]
    since: float


@dataclass(slots=True)
class _Times:
    """The longest of a request's items."""

    queue: float = 0.0
    infer: float = 0.0


class Batcher(Generic[Ask, Reply]):
    """Answers asks of many requests with full batches. One per model and event loop.

    An idle model starts with what is there; while it works, the queue fills. A whole batch that waits is collated
    meanwhile, so that the next forward pass follows at once.
    """

    def __init__(
        self, name: str, engine: BatchEngine[Ask, Any, Reply], config: BatchConfig, meters: Meters
    ) -> None:
        self.engine, self.admission = engine, Admission(name, config, meters)
        self._name, self._config, self._meters = name, config, meters
        self._max = min(engine.max_batch, config.max_items or engine.max_batch)
        self._buckets: dict[Hashable, deque[_Waiting]] = {}
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        # one thread, not a lock: torch keeps a team of OpenMP threads per calling thread, and a second one would compete
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")

    # --------------------------------------------------------------------------------------------------- requests

    async def answer(self, asks: Sequence[Ask], deadline: float | None = None) -> Answered[Reply]:
        """One reply per ask, in order; raises the first RequestError of an item, 429 and 504 for all of them.

        deadline: a time of the event loop's clock. A request of more than two batches holds room for two, and flows through
        it: others get a turn. Cancelled, it takes its items along.
        """
        if not asks:
            return Answered([], 0.0, 0.0)
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.get_running_loop().create_task(self._run())
        times, size = _Times(), sum(ask.size for ask in asks)
        groups = _together(asks)
        with self.admission.hold(min(len(asks), 2 * self._max), size):
            async with self.admission.deadline(self.admission.latest(deadline)):
                if len(groups) == 1:
                    replies = await self._answer_group(groups[0], times)
                else:
                    replies = await self._answer_groups(groups, times)
        self._meters.count("fmray_items_total", len(asks), model=self._name)
        return Answered(replies, times.queue, times.infer)

    async def _answer_groups(self, groups: Sequence[Sequence[Ask]], times: _Times) -> list[Reply]:
        gate = asyncio.Semaphore(max(2, 2 * self._max // max(map(len, groups))))

        async def one(group: Sequence[Ask]) -> list[Reply]:
            async with gate:
                return await self._answer_group(group, times)

        tasks = [asyncio.ensure_future(one(group)) for group in groups]
        try:
            return [reply for replies in await asyncio.gather(*tasks) for reply in replies]
        finally:
            for task in tasks:
                task.cancel()

    async def _answer_group(self, asks: Sequence[Ask], times: _Times) -> list[Reply]:
        started = perf_counter()
        items = await self.admission.on_cpu(self._prepare, asks)
        prepared_at = perf_counter()
        note_stage("prepare", started, prepared_at, self._name)
        for _ in items:
            self._meters.observe(
                "fmray_prepare_seconds", (prepared_at - started) / len(items), model=self._name
            )
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(item, loop.create_future(), prepared_at) for item in items]
        for each in waiting:
            self._buckets.setdefault(each.prepared.bucket, deque()).append(each)
        self._arrived.set()
        replies = []
        try:
            for each in waiting:
                reply, queued, took = await each.done
                looked_at = prepared_at + queued
                note_stage("queue", prepared_at, looked_at, self._name)
                note_stage("infer", looked_at, looked_at + took, self._name)
                times.queue, times.infer = max(times.queue, queued), max(times.infer, took)
                replies.append(reply)
        finally:
            for each in waiting:
                each.done.cancel()  # where this request has ended early, the model is spared the rest
        return replies

    def _prepare(self, asks: Sequence[Ask]) -> list[Prepared[Any]]:
        return [self.engine.prepare(ask) for ask in asks]

    # ----------------------------------------------------------------------------------------------------- batches

    async def _run(self) -> None:
        """Form, collate, compute, one batch ahead at most."""
        computing: asyncio.Task[None] | None = None
        while True:
            forming = asyncio.ensure_future(self._next_batch(whole=computing is not None))
            if computing is not None:
                await asyncio.wait({forming, computing}, return_when=asyncio.FIRST_COMPLETED)
                if not forming.done():
                    forming.cancel()
                    computing = None
                    continue
            batch = await forming
            collated = None
            if computing is not None:
                collated = await self._collated_ahead(batch)
                await computing
            computing = asyncio.ensure_future(self._compute(batch, collated))

    async def _collated_ahead(self, batch: Sequence[_Waiting]) -> Any | None:
        """None where it fails: `_compute` meets the same failure, and finds the item that is to blame."""
        values = [each.prepared.value for each in batch]
        collating = self.admission.on_cpu(self.engine.collate, values)
        outcome: Sequence[Any] = await asyncio.gather(collating, return_exceptions=True)
        return None if isinstance(outcome[0], BaseException) else outcome[0]

    async def _next_batch(self, *, whole: bool) -> list[_Waiting]:
        """Items of the bucket whose first has waited longest; with `whole`, only once there is a full batch of them."""
        while True:
            for bucket in [bucket for bucket, queue in self._buckets.items() if not _drop_departed(queue)]:
                del self._buckets[bucket]
            ready = [queue for queue in self._buckets.values() if not whole or len(queue) >= self._max]
            if ready:
                queue = min(ready, key=lambda queue: queue[0].since)
                await self._wait_for_more(queue)
                batch = [queue.popleft() for _ in range(min(self._max, len(queue)))]
                batch = [each for each in batch if not each.done.done()]
                if batch:
                    return batch
            else:
                self._arrived.clear()
                await self._arrived.wait()

    async def _wait_for_more(self, queue: deque[_Waiting]) -> None:
        latest = queue[0].since + self._config.wait_ms / 1000
        while len(queue) < self._max and (left := latest - perf_counter()) > 0:
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    async def _compute(self, batch: Sequence[_Waiting], collated: Any | None = None) -> None:
        """One forward pass; where it fails, its halves, down to the item that is to blame."""
        kept = [each for each in batch if not each.done.done()]
        if not kept:
            return
        if len(kept) < len(batch):  # clients have left since it was collated ahead
            batch, collated = kept, None
        loop, started = asyncio.get_running_loop(), perf_counter()
        forward = loop.run_in_executor(self._device, self._forward, batch, collated)
        await asyncio.wait({forward})
        if (error := forward.exception()) is not None:  # whatever a model raises ends one item, not the loop
            await self._fail_alone(batch, error)
            return
        replies = forward.result()
        took = perf_counter() - started
        self.admission.answered(len(batch), took)
        self._meters.observe("fmray_infer_seconds", took, model=self._name)
        self._meters.observe("fmray_batch_items", len(batch), model=self._name)
        for each, reply in zip(batch, replies, strict=True):
            queued = started - each.since
            self._meters.observe("fmray_queue_seconds", queued, model=self._name)
            if each.done.done():
                continue
            if isinstance(reply, RequestError):
                each.done.set_exception(reply)
            else:
                each.done.set_result((reply, queued, took))

    def _forward(self, batch: Sequence[_Waiting], collated: Any | None) -> Sequence[Reply | RequestError]:
        if collated is None:
            collated = self.engine.collate([each.prepared.value for each in batch])
        return self.engine.forward(collated)

    async def _fail_alone(self, batch: Sequence[_Waiting], error: BaseException) -> None:
        out_of_memory = is_out_of_memory(error)
        if len(batch) > 1:
            logger.warning("a batch of %d items failed with %s: halved", len(batch), type(error).__name__)
            half = len(batch) // 2
            await self._compute(batch[:half])
            await self._compute(batch[half:])
            return
        logger.error("an item failed in the model of %s", self._name, exc_info=error)
        reason = "out_of_memory" if out_of_memory else "model_failed"
        self._meters.count("fmray_rejected_total", model=self._name, reason=reason)
        message = "the model could not answer this item" + (
            ": too little memory for it" if out_of_memory else ""
        )
        if not batch[0].done.done():
            batch[0].done.set_exception(RequestError(500, reason, message))

    async def check(self, deadline: float) -> None:
        """A synthetic item goes through; raises RequestError."""
        await self.answer([self.engine.probe], deadline)

    # --------------------------------------------------------------------------------------------------------- end

    async def drained(self) -> None:
        """Waits until every request that has found this model has left."""
        while not self.admission.empty:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """End the threads; what still waits is answered 503."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        for queue in self._buckets.values():
            for each in queue:
                if not each.done.done():
                    each.done.set_exception(RequestError(503, "shutting_down", CLOSED, retry_after=1.0))
        self._buckets.clear()
        self.admission.close()
        self._device.shutdown(wait=False, cancel_futures=True)


def _drop_departed(queue: deque[_Waiting]) -> bool:
    """Whether anybody still waits at the head of the queue, once those who do not are gone."""
    while queue and queue[0].done.done():
        queue.popleft()
    return bool(queue)


def _together(asks: Sequence[Ask]) -> list[list[Ask]]:
    """Neighbours that one thread prepares in one go."""
    groups: list[list[Ask]] = []
    size = 0
    for ask in asks:
        size += ask.size
        if not groups or size > TOGETHER_BYTES or len(groups[-1]) >= TOGETHER_ASKS:
            groups.append([])
            size = ask.size
        groups[-1].append(ask)
    return groups
