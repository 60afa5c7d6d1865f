"""Threads in turns: a little work passes much, a lone request has all threads, who leaves is not begun, nothing is lost."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from fmray.serving.turns import Turns


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scene()

    asyncio.run(bounded())


def test_a_little_work_passes_much() -> None:
    async def scene() -> None:
        turns, order = Turns(1), list[str]()

        def work(name: str) -> None:
            time.sleep(0.005)
            order.append(name)

        much = [asyncio.ensure_future(turns.run("much", work, "much")) for _ in range(10)]
        await asyncio.sleep(0)
        little = [asyncio.ensure_future(turns.run(name, work, name)) for name in ("a", "b", "a")]
        await asyncio.gather(*much, *little)
        # one is at work and one at the door; the round is much, a, b, then much, a
        assert order[:7] == ["much", "much", "much", "a", "b", "much", "a"]
        assert order[7:] == ["much"] * 6
        turns.close()

    run(scene)


def test_who_is_alone_has_all_threads() -> None:
    async def scene() -> None:
        turns, together = Turns(3), threading.Barrier(3)
        await asyncio.gather(*(turns.run("one", together.wait, 5) for _ in range(6)))
        turns.close()

    run(scene)


def test_who_leaves_is_not_begun_and_blocks_nobody() -> None:
    async def scene() -> None:
        turns, begun, gate = Turns(1), list[int](), threading.Event()

        def work(number: int) -> None:
            begun.append(number)
            assert gate.wait(5)

        tasks = [asyncio.ensure_future(turns.run(number % 2, work, number)) for number in range(6)]
        while not begun:
            await asyncio.sleep(0.001)
        for task in tasks[1:5]:
            task.cancel()
        await asyncio.gather(*tasks[1:5], return_exceptions=True)
        gate.set()
        await asyncio.gather(tasks[0], tasks[5])
        assert begun == [0, 5]
        await turns.run("next", work, 6)
        turns.close()

    run(scene)


def test_a_thread_whose_client_has_left_is_still_taken() -> None:
    """Its work cannot be ended; until it ends by itself, no other one is begun in its place."""

    async def scene() -> None:
        turns, at_once, most, gate = Turns(2), 0, 0, threading.Event()
        lock = threading.Lock()

        def work() -> None:
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            gate.wait(5)
            with lock:
                at_once -= 1

        tasks = [asyncio.ensure_future(turns.run(number, work)) for number in range(4)]
        while at_once < 2:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        await asyncio.sleep(0.05)
        assert at_once == 2
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 2
        turns.close()

    run(scene)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_whoever_leaves_whenever(seed: int) -> None:
    async def scene() -> None:
        draw, turns = random.Random(seed), Turns(2)

        def work(number: int) -> int:
            time.sleep(draw.random() / 500)
            if number % 7 == 0:
                raise ValueError(str(number))
            return number

        tasks = [asyncio.ensure_future(turns.run(draw.randrange(5), work, number)) for number in range(120)]
        left = set()
        for _ in range(40):
            number = draw.randrange(120)
            if tasks[number].cancel():
                left.add(number)
            await asyncio.sleep(draw.random() / 500)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, asyncio.CancelledError):
                assert number in left
            elif number % 7 == 0:
                assert isinstance(outcome, ValueError)
            else:
                assert outcome == number
        assert await asyncio.gather(*(turns.run("after", int, number) for number in range(4))) == [0, 1, 2, 3]
        turns.close()

    run(scene)


def test_closing_cancels_what_waits() -> None:
    async def scene() -> None:
        turns, gate = Turns(1), threading.Event()
        tasks = [asyncio.ensure_future(turns.run(number, gate.wait, 5)) for number in range(3)]
        await asyncio.sleep(0.02)
        turns.close()
        gate.set()
        first, *others = await asyncio.gather(*tasks, return_exceptions=True)
        assert first is True
        assert all(isinstance(other, asyncio.CancelledError) for other in others)
        with pytest.raises(RuntimeError):
            await turns.run("late", int, 1)

    run(scene)
