"""The loop around a real tiny model: answers that join and leave, departures, too little memory, deadlines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import torch

from fmray.config.serving import BatchConfig
from fmray.errors import RequestError
from fmray.models.answering import load_answering
from fmray.models.decoding.running import Asked, Token
from fmray.serving.chat_engine import AnswerEngine
from fmray.serving.chat_loop import ChatLoop
from fmray.serving.conversations import ChatAsk
from fmray.serving.metrics import Meters
from fmray.types import Dialogue, Pictures, Turn

CPU = torch.device("cpu")
QUESTIONS = ["is it big?", "what color is it?", "how many are there?", "no", "what is it and what is it?"]
NONE = Pictures((), None)


def ask_of(question: str, **options: Any) -> ChatAsk:
    return ChatAsk(Dialogue("d", (), (Turn((question,), ""),)), {}, **options)


@pytest.fixture(scope="module")
def engine(mllm_checkpoint: str) -> AnswerEngine:
    return AnswerEngine(load_answering(mllm_checkpoint, CPU), "mllm", max_pixels=10**6)


def loop_of(engine: AnswerEngine, **config: object) -> ChatLoop:
    return ChatLoop("talk", engine, BatchConfig.model_validate(config), Meters())


async def said(loop: ChatLoop, ask: ChatAsk) -> str:
    async with aclosing(loop.tokens(ask)) as tokens:
        return "".join([token.text async for token in tokens])


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scene()

    asyncio.run(bounded())


def alone(engine: AnswerEngine, question: str, longest: int) -> str:
    dialogue = Dialogue("d", (), (Turn((question,), ""),))
    return engine._answering.answer([dialogue], NONE, max_new_tokens=longest)[0].text


def test_many_at_once_say_what_each_says_alone(engine: AnswerEngine) -> None:
    asks = [(question, 2 + place) for place, question in enumerate(QUESTIONS * 4)]

    async def scene() -> None:
        loop = loop_of(engine, max_items=3)
        told = await asyncio.gather(*(said(loop, ask_of(q, max_new_tokens=n)) for q, n in asks))
        assert told == [alone(engine, q, n) for q, n in asks]
        assert loop.admission.empty
        assert loop._running.rows == 0
        loop.close()

    run(scene)


def test_what_is_drawn_depends_on_the_seed_alone(engine: AnswerEngine) -> None:
    ask = ask_of(QUESTIONS[1], max_new_tokens=12, temperature=1.5, seed=11)

    async def scene() -> None:
        loop = loop_of(engine)
        first = await said(loop, ask)
        beside = await asyncio.gather(
            *(said(loop, replace(ask, seed=seed)) for seed in range(8)), said(loop, ask)
        )
        assert beside[-1] == first
        assert len(set(beside)) > 4, "other seeds say other things"
        loop.close()

    run(scene)


def test_who_stops_listening_makes_room(engine: AnswerEngine) -> None:
    async def scene() -> None:
        loop = loop_of(engine, max_items=1)
        long = loop.tokens(ask_of(QUESTIONS[0], max_new_tokens=100, temperature=2.0, seed=3))
        await anext(long)
        waiting = asyncio.ensure_future(said(loop, ask_of(QUESTIONS[1], max_new_tokens=4)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await long.aclose()
        assert await waiting == alone(engine, QUESTIONS[1], 4)
        assert loop.admission.empty
        loop.close()

    run(scene)


def test_a_conversation_that_cannot_be_read_is_refused_before_it_waits(engine: AnswerEngine) -> None:
    async def scene() -> None:
        loop = loop_of(engine)
        with pytest.raises(RequestError) as caught:
            await said(loop, ask_of("what " * 300))
        assert caught.value.code == "context_length_exceeded"
        assert loop.admission.empty
        loop.close()

    run(scene)


def test_the_deadline_ends_an_answer_in_the_middle(engine: AnswerEngine) -> None:
    async def scene() -> None:
        loop = loop_of(engine)
        loop._running = Scarce(loop._running, rows=99, seconds=0.02)  # type: ignore[assignment]
        await loop.check(asyncio.get_running_loop().time() + 10)
        tokens = loop.tokens(
            ask_of(QUESTIONS[0], max_new_tokens=150, temperature=2.0, seed=1),
            asyncio.get_running_loop().time() + 0.2,
        )
        told = 0

        async def listen() -> None:
            nonlocal told
            async for _ in tokens:
                told += 1

        with pytest.raises(RequestError) as caught:
            await listen()
        assert 0 < told < 15
        assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
        await asyncio.sleep(0.05)
        assert loop._running.rows == 0
        loop.close()

    run(scene)


class Scarce:
    """A running model in whose memory only so many rows fit, and which fails where it is told to."""

    def __init__(self, running: Any, rows: int, seconds: float = 0.0) -> None:
        self._running, self.fit, self.seconds, self.broken = running, rows, seconds, False
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._running, name)

    def join(self, asked: Sequence[Asked]) -> list[Token]:
        if self._running.rows + len(asked) > self.fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(self._running.join(asked))

    def step(self) -> list[Token]:
        self.most = max(self.most, self._running.rows)
        time.sleep(self.seconds)
        if self.broken:
            self.broken = False
            raise RuntimeError("device-side assert at 0x7f00")
        return list(self._running.step())


def test_too_little_memory_for_all_lets_some_wait(engine: AnswerEngine) -> None:
    async def scene() -> None:
        loop = loop_of(engine)
        scarce = Scarce(loop._running, rows=2)
        loop._running = scarce  # type: ignore[assignment]
        asks = [(question, 6) for question in QUESTIONS * 2]
        told = await asyncio.gather(*(said(loop, ask_of(q, max_new_tokens=n)) for q, n in asks))
        assert told == [alone(engine, q, n) for q, n in asks]
        assert scarce.most == 2
        loop.close()

    run(scene)


def test_a_model_that_fails_ends_what_it_was_saying_and_goes_on(engine: AnswerEngine) -> None:
    async def scene() -> None:
        loop = loop_of(engine)
        scarce = Scarce(loop._running, rows=99)
        loop._running = scarce  # type: ignore[assignment]
        scarce.broken = True
        asks = [said(loop, ask_of(question, max_new_tokens=6)) for question in QUESTIONS]
        failed = await asyncio.gather(*asks, return_exceptions=True)
        codes = {getattr(error, "code", None) for error in failed}
        assert "model_failed" in codes
        assert not any("0x" in str(error) for error in failed)
        assert await said(loop, ask_of(QUESTIONS[0], max_new_tokens=6)) == alone(engine, QUESTIONS[0], 6)
        loop.close()

    run(scene)


def test_a_full_house_answers_429(engine: AnswerEngine) -> None:
    async def scene() -> None:
        loop = loop_of(engine, queue_items=2, max_items=1)
        first = loop.tokens(ask_of(QUESTIONS[0], max_new_tokens=100, temperature=2.0, seed=3))
        await anext(first)
        second = asyncio.ensure_future(said(loop, ask_of(QUESTIONS[1], max_new_tokens=3)))
        await asyncio.sleep(0.02)
        started = time.monotonic()
        with pytest.raises(RequestError) as caught:
            await said(loop, ask_of(QUESTIONS[2]))
        assert caught.value.status == 429
        assert time.monotonic() - started < 0.1
        await first.aclose()
        await second
        loop.close()

    run(scene)
