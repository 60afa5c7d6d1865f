"""Who is let in: items and bytes that one model holds, the threads that prepare them, and the time that they have."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from fmray.config.serving import BatchConfig
from fmray.errors import RequestError
from fmray.serving.metrics import Meters
from fmray.serving.turns import Turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Value = TypeVar("Value")

_REQUEST: ContextVar[object] = ContextVar("_REQUEST", default=None)
"""Which request is held, for the tasks that it begins too."""

MIB = 2**20
CLOSED = "this replica is shutting down; send the request again"


class Admission:
    """The waiting room of one model. For one event loop: no lock."""

    def __init__(self, name: str, config: BatchConfig, meters: Meters) -> None:
        self.name, self.config, self.meters = name, config, meters
        self.closed = False
        self._items, self._bytes, self._visits = 0, 0, 0
        self._pace = 0.0
        self.last_answer = -math.inf
        """When the model last answered anything, by `time.monotonic`."""
        threads = config.prepare_threads or max(2, os.cpu_count() or 1)
        self._cpu = Turns(threads)

    @property
    def empty(self) -> bool:
        """No request is about to ask this model, none waits, none is being answered."""
        return not self._visits and not self._items

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Around a request that has found this model and may ask it: until it ends, the model is not taken away."""
        self._visits += 1
        try:
            yield
        finally:
            self._visits -= 1

    @contextmanager
    def hold(self, items: int, size: int) -> Iterator[None]:
        """Room for some items of `size` bytes; raises RequestError: 429 where there is none, 503 when closed.

        A lone request is always let in: how large it may be is the border's business.
        """
        if self.closed:
            raise RequestError(503, "shutting_down", CLOSED, retry_after=1.0)
        over = self._items + items > self.config.queue_items
        over = over or self._bytes + size > self.config.queue_mib * MIB
        if over and self._items:
            self.meters.count("fmray_rejected_total", items, model=self.name, reason="overloaded")
            message = f"{self._items} items wait for {self.name!r} and no more may; try again later"
            raise RequestError(429, "overloaded", message, retry_after=self.retry_after)
        self._change(items, size)
        _REQUEST.set(object())
        try:
            yield
        finally:
            _REQUEST.set(None)  # not reset: a stream may end in another task than it began in
            self._change(-items, -size)

    @property
    def retry_after(self) -> float:
        """Seconds in which what waits now is answered, at the pace of late; 1 to 30, whole."""
        return float(min(30, max(1, math.ceil(self._items * self._pace))))

    def answered(self, items: int, seconds: float) -> None:
        """Told how long a batch took: the pace is an exponential mean over about ten of them."""
        self.last_answer = time.monotonic()
        pace = seconds / items
        self._pace = pace if not self._pace else 0.9 * self._pace + 0.1 * pace

    def _change(self, items: int, size: int) -> None:
        self._items += items
        self._bytes += size
        self.meters.gauge("fmray_held_items", self._items, model=self.name)
        self.meters.gauge("fmray_held_bytes", self._bytes, model=self.name)

    def latest(self, asked: float | None) -> float:
        """The loop's time at which a request that begins now ends: as asked, the configured one at the latest."""
        most = asyncio.get_running_loop().time() + self.config.deadline_seconds
        return most if asked is None else min(asked, most)

    @asynccontextmanager
    async def deadline(self, at: float) -> AsyncIterator[None]:
        """What is inside ends at that time with RequestError(504)."""
        try:
            async with asyncio.timeout_at(at):
                yield
        except TimeoutError:
            self.meters.count("fmray_rejected_total", model=self.name, reason="deadline")
            message = "the request was not answered within its time; send less, or try again later"
            raise RequestError(504, "deadline_exceeded", message, retry_after=self.retry_after) from None

    async def on_cpu(self, work: Callable[..., Value], *arguments: object) -> Value:
        """Any CPU work of a request, in the pool; what belongs to one that is held shares its turns."""
        return await self._cpu.run(_REQUEST.get() or object(), work, *arguments)

    def close(self) -> None:
        """Let nobody in any more and end the threads."""
        self.closed = True
        self._cpu.close()
