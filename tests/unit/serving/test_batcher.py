"""The batcher around an engine that says exactly what it was given: grouping, limits, departures, failures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.config.serving import BatchConfig
from fmray.errors import RequestError
from fmray.serving.batcher import Batcher
from fmray.serving.engines import Prepared
from fmray.serving.metrics import Meters


@dataclass(frozen=True)
class Word:
    text: str
    size: int = 10


class Echo:
    """Answers a word with itself in capitals. Buckets by length; remembers every batch."""

    probe = Word("probe")

    def __init__(self, *, seconds: float = 0.0, max_batch: int = 4) -> None:
        self.max_batch, self.seconds = max_batch, seconds
        self.batches: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def prepare(self, ask: Word) -> Prepared[str]:
        if ask.text == "unreadable":
            raise RequestError(400, "invalid_image", "it cannot be read", "input[0]")
        return Prepared(ask.text, len(ask.text), ask.size)

    def collate(self, items: Sequence[str]) -> list[str]:
        if "odd shape" in items:
            raise TypeError("cannot stack")
        return list(items)

    def forward(self, batch: list[str]) -> list[str | RequestError]:
        self.go.wait(10)
        time.sleep(self.seconds)
        self.batches.append(batch)
        if "too big" in batch and len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if "breaks!" in batch:
            raise RuntimeError("device-side assert")
        return [RequestError(500, "model_failed", "no number") if w == "nan" else w.upper() for w in batch]


def batcher_of(engine: Echo, **config: object) -> Batcher[Word, str]:
    return Batcher("echo", engine, BatchConfig.model_validate(config), Meters())


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scene()

    asyncio.run(bounded())


async def ask(batcher: Batcher[Word, str], *words: str) -> list[str]:
    return (await batcher.answer([Word(word) for word in words])).replies


async def settle() -> None:
    """Until what was asked waits in its bucket."""
    await asyncio.sleep(0.1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.text("ab", min_size=1, max_size=4), max_size=9), min_size=1, max_size=12))
def test_every_request_gets_its_own_answers_in_order(requests: list[list[str]]) -> None:
    engine = Echo()

    async def scene() -> None:
        batcher = batcher_of(engine)
        replies = await asyncio.gather(*(ask(batcher, *words) for words in requests))
        assert replies == [[word.upper() for word in words] for words in requests]
        assert batcher.admission.empty
        batcher.close()

    run(scene)
    assert all(len({len(word) for word in batch}) == 1 for batch in engine.batches), "buckets do not mix"
    assert all(len(batch) <= engine.max_batch for batch in engine.batches)
    assert sum(map(len, engine.batches)) == sum(map(len, requests)), "each item passes the model once"


def test_what_waits_while_the_model_works_becomes_full_batches() -> None:
    engine = Echo()

    async def scene() -> None:
        batcher = batcher_of(engine, prepare_threads=1)  # two might be prepared in either order
        engine.go.clear()
        first = asyncio.ensure_future(ask(batcher, "a"))
        await settle()
        others = [asyncio.ensure_future(ask(batcher, letter)) for letter in "bcdefghij"]
        await settle()
        engine.go.set()
        await asyncio.gather(first, *others)
        assert [len(batch) for batch in engine.batches] == [1, 4, 4, 1]
        assert [letter for batch in engine.batches for letter in batch] == list("abcdefghij"), "first come"
        batcher.close()

    run(scene)


def test_an_idle_model_waits_for_more_if_told_to() -> None:
    engine = Echo()

    async def scene() -> None:
        batcher = batcher_of(engine, wait_ms=300)
        started = time.monotonic()
        await asyncio.gather(*(ask(batcher, letter) for letter in "abcd"))
        assert time.monotonic() - started < 0.25, "a full batch waits no longer"
        assert engine.batches == [list("abcd")]
        started = time.monotonic()
        await asyncio.gather(ask(batcher, "e"), ask(batcher, "f"))
        assert time.monotonic() - started > 0.28
        assert engine.batches[1:] == [["e", "f"]]
        batcher.close()

    run(scene)


@pytest.mark.parametrize(("word", "code"), [("breaks!", "model_failed"), ("odd shape", "model_failed")])
def test_a_bad_item_fails_alone(word: str, code: str) -> None:
    engine = Echo(max_batch=8)
    good = [f"{i:0{len(word)}d}" for i in range(7)]

    async def scene() -> None:
        batcher = batcher_of(engine)
        engine.go.clear()
        gate = asyncio.ensure_future(ask(batcher, "-" * len(word)))
        await settle()
        tasks = [asyncio.ensure_future(ask(batcher, each)) for each in [*good[:3], word, *good[3:]]]
        await settle()
        engine.go.set()
        replies = await asyncio.gather(gate, *tasks, return_exceptions=True)
        failed = [reply for reply in replies if isinstance(reply, BaseException)]
        assert [isinstance(error, RequestError) and (error.status, error.code) for error in failed] == [
            (500, code)
        ]
        assert [reply for reply in replies[1:] if isinstance(reply, list)] == [[each] for each in good]
        assert await ask(batcher, "fine") == ["FINE"], "the loop goes on"
        batcher.close()

    run(scene)


def test_too_little_memory_for_a_batch_halves_it() -> None:
    engine = Echo(max_batch=8)

    async def scene() -> None:
        batcher = batcher_of(engine)
        replies = await asyncio.gather(*(ask(batcher, word) for word in ["too big", "1234567", "7654321"]))
        assert replies == [["TOO BIG"], ["1234567"], ["7654321"]]
        batcher.close()

    run(scene)


def test_an_answer_that_is_no_number_and_a_picture_that_is_none_concern_their_request_alone() -> None:
    engine = Echo()

    async def scene() -> None:
        batcher = batcher_of(engine)
        replies = await asyncio.gather(
            ask(batcher, "nan"),
            ask(batcher, "abc"),
            ask(batcher, "abc", "unreadable"),
            return_exceptions=True,
        )
        codes = [reply.code if isinstance(reply, RequestError) else reply for reply in replies]
        assert codes == ["model_failed", ["ABC"], "invalid_image"]
        assert batcher.admission.empty
        batcher.close()

    run(scene)


def test_a_client_that_left_costs_nothing() -> None:
    engine = Echo()

    async def scene() -> None:
        batcher = batcher_of(engine)
        engine.go.clear()
        first = asyncio.ensure_future(ask(batcher, "a"))
        await settle()
        leaving = asyncio.ensure_future(ask(batcher, *["b"] * 50))
        staying = asyncio.ensure_future(ask(batcher, "c"))
        await settle()
        leaving.cancel()
        await settle()
        engine.go.set()
        await asyncio.gather(first, staying)
        assert engine.batches == [["a"], ["c"]], "what nobody waits for is not computed"
        assert batcher.admission.empty
        batcher.close()

    run(scene)


def test_more_than_may_wait_is_refused_at_once_and_let_in_again_later() -> None:
    engine = Echo()

    async def scene() -> None:
        batcher = batcher_of(engine, queue_items=5)
        engine.go.clear()
        waiting = [asyncio.ensure_future(ask(batcher, "a")) for _ in range(5)]
        await settle()
        started = time.monotonic()
        with pytest.raises(RequestError) as caught:
            await ask(batcher, "b")
        assert time.monotonic() - started < 0.05
        assert (caught.value.status, caught.value.code) == (429, "overloaded")
        assert caught.value.retry_after is not None
        assert caught.value.retry_after >= 1
        engine.go.set()
        await asyncio.gather(*waiting)
        assert await ask(batcher, "b") == ["B"]
        assert await ask(batcher, *["c"] * 40) == ["C"] * 40, "a lone request of any length is let in"
        batcher.close()

    run(scene)


def test_bytes_are_bounded_too() -> None:
    engine = Echo()

    async def scene() -> None:
        batcher = batcher_of(engine, queue_mib=1)
        engine.go.clear()
        heavy = asyncio.ensure_future(batcher.answer([Word("a", size=900_000)]))
        await settle()
        with pytest.raises(RequestError, match="no more may"):
            await batcher.answer([Word("b", size=200_000)])
        engine.go.set()
        await heavy
        batcher.close()

    run(scene)


def test_a_request_that_is_too_old_is_answered_504_and_dropped() -> None:
    engine = Echo()

    async def scene() -> None:
        batcher = batcher_of(engine, deadline_seconds=0.3)
        engine.go.clear()
        first, second = (asyncio.ensure_future(ask(batcher, word)) for word in ("a", "bb"))
        for each in (first, second):
            with pytest.raises(RequestError) as caught:
                await each
            assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
        engine.go.set()
        await settle()
        assert engine.batches == [["a"]], "the second was never computed"
        soon = asyncio.get_running_loop().time() - 1
        with pytest.raises(RequestError, match="within its time"):
            await batcher.answer([Word("c")], deadline=soon)
        batcher.close()

    run(scene)


def test_a_long_request_lets_others_through() -> None:
    engine = Echo(seconds=0.02)

    async def scene() -> None:
        batcher = batcher_of(engine)
        long = asyncio.ensure_future(ask(batcher, *["a"] * 200))
        await asyncio.sleep(0.15)
        started = time.monotonic()
        assert await ask(batcher, "b") == ["B"]
        assert time.monotonic() - started < 0.5, "not behind 200 items (1 s)"
        assert not long.done()
        assert await long == ["A"] * 200
        batcher.close()

    run(scene)


def test_closing_answers_what_waits() -> None:
    engine = Echo()

    async def scene() -> None:
        batcher = batcher_of(engine)
        engine.go.clear()
        running = asyncio.ensure_future(ask(batcher, "a"))
        await settle()
        asked = [asyncio.ensure_future(ask(batcher, letter)) for letter in "bc"]
        await settle()
        batcher.close()
        engine.go.set()
        waiting = await asyncio.gather(*asked, return_exceptions=True)
        assert [getattr(error, "code", error) for error in waiting] == ["shutting_down"] * 2
        with pytest.raises(RequestError, match="shutting down"):
            await ask(batcher, "d")
        assert await running == ["A"], "what runs is answered"

    run(scene)


def test_times_are_those_of_the_items() -> None:
    engine = Echo(seconds=0.05)

    async def scene() -> None:
        batcher = batcher_of(engine)
        first = asyncio.ensure_future(batcher.answer([Word("a")]))
        await asyncio.sleep(0.01)
        second = await batcher.answer([Word("b")])
        assert 0.05 <= second.infer_seconds < 0.2
        assert 0.02 <= second.queue_seconds < 0.2
        assert (await first).queue_seconds < 0.02
        batcher.close()

    run(scene)
