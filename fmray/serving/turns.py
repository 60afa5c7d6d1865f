"""Threads for requests' CPU work, given in turns: who asks for much waits longer than who asks for little."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Value = TypeVar("Value")


class Turns:
    """A pool whose free thread goes to the next request in a round, not to the next piece of work. For one event loop: no lock.

    First come, first served would let one request with a hundred large pictures keep everybody else waiting for all of them;
    so they wait for one of them, while a request that is alone has all threads.
    """

    def __init__(self, threads: int) -> None:
        self._free = threads + 1  # one more is at the door, lest a thread wait for a busy event loop
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="prepare")
        self._waiting: OrderedDict[object, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(self, whose: object, work: Callable[..., Value], *arguments: object) -> Value:
        """The work's value, once it is this request's turn. Cancelled while it waits, it is never begun."""
        await self._turn(whose)
        try:
            running = self._pool.submit(work, *arguments)
        except RuntimeError:  # closed
            self._free += 1
            raise
        loop = asyncio.get_running_loop()

        def ended(_: Future[Value]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._give_back)

        running.add_done_callback(ended)
        return await asyncio.wrap_future(running)

    async def _turn(self, whose: object) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(whose, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had just come
                self._give_back()
            raise

    def _give_back(self) -> None:
        """To the next one in the round, who goes to its end; to nobody where none waits."""
        while self._waiting:
            whose, turns = self._waiting.popitem(last=False)
            while turns and turns[0].done():  # has left
                turns.popleft()
            if turns:
                turns.popleft().set_result(None)
                if turns:
                    self._waiting[whose] = turns
                return
        self._free += 1

    def close(self) -> None:
        """End the threads after what they are at; what waits is cancelled."""
        for turns in self._waiting.values():
            for turn in turns:
                turn.cancel()
        self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
