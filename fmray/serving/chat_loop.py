"""Many conversations answered at once: a new one joins at the next token, a finished one leaves, a departed client's too.

A request: tokens -> prepare (threads) -> wait -> Running.join and Running.step (one thread) -> its tokens, one by one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter

from fmray.config.serving import BatchConfig
from fmray.errors import DataError, RequestError
from fmray.models.decoding.running import Asked, Token
from fmray.serving.admission import CLOSED, Admission
from fmray.serving.chat_engine import AnswerEngine, ChatItem
from fmray.serving.conversations import ChatAsk
from fmray.serving.engines import MODEL_FAILURES, is_out_of_memory
from fmray.serving.finished import note_stage
from fmray.serving.metrics import Meters

logger = logging.getLogger(__name__)

JOIN_AT_ONCE = 8
"""Conversations that are read together: while they are, nobody else gets a token."""
FAILED = "the model could not answer this conversation"


@dataclass(slots=True)
class _Listener:
    """A request that waits for the tokens of its answer."""

    asked: Asked
    since: float
    joined: float = 0.0
    """When it first joined the others; 0: not yet."""
    inbox: asyncio.Queue[Token | RequestError] = field(default_factory=asyncio.Queue)
    told: int = 0
    """Tokens it has been told; an answer that begins again says them again, to nobody."""
    repeated: int = 0
    """How many of those have been said again."""
    left: bool = False


@dataclass(slots=True)
class _Turn:
    """What one go of the model brought."""

    tokens: list[Token] = field(default_factory=list)
    failed: dict[Hashable, RequestError] = field(default_factory=dict)
    again: list[Hashable] = field(default_factory=list)
    """Answers for which there was too little memory beside the others: they begin again when one has ended."""


class ChatLoop:
    """The answers of one model. One per model and event loop."""

    def __init__(self, name: str, engine: AnswerEngine, config: BatchConfig, meters: Meters) -> None:
        self.engine, self.admission = engine, Admission(name, config, meters)
        self._name, self._meters = name, meters
        self._running = engine.running(config.max_items or engine.max_rows)
        self._keys = itertools.count()
        self._waiting: deque[_Listener] = deque()
        self._talking: dict[Hashable, _Listener] = {}
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")

    # --------------------------------------------------------------------------------------------------- requests

    async def tokens(self, ask: ChatAsk, deadline: float | None = None) -> AsyncGenerator[Token, None]:
        """The answer's tokens as they are said. Raises RequestError: before the first one 400, 429 and 503, then 500 and 504.

        deadline: a time of the event loop's clock. Whoever stops listening ends the answer (`aclosing`).
        """
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.get_running_loop().create_task(self._run())
        at = self.admission.latest(deadline)
        with self.admission.hold(1, ask.size):
            async with self.admission.deadline(at):
                started = perf_counter()
                prepared = await self.admission.on_cpu(self.engine.prepare, ask)
            now = perf_counter()
            self._meters.observe("fmray_prepare_seconds", now - started, model=self._name)
            note_stage("prepare", started, now, self._name)
            listener = _Listener(_asked(next(self._keys), prepared.value), now)
            self._waiting.append(listener)
            self._arrived.set()
            try:
                while True:
                    async with self.admission.deadline(at):
                        token = await listener.inbox.get()
                    if isinstance(token, RequestError):
                        raise token
                    yield token
                    if token.finished is not None:
                        self._meters.count("fmray_items_total", model=self._name)
                        return
            finally:
                if listener.joined:
                    note_stage("queue", listener.since, listener.joined, self._name)
                    note_stage("infer", listener.joined, perf_counter(), self._name)
                listener.left = True
                self._arrived.set()

    async def check(self, deadline: float) -> None:
        """A synthetic conversation is answered; raises RequestError."""
        async for _ in self.tokens(self.engine.probe, deadline):
            pass

    # ------------------------------------------------------------------------------------------------------- tokens

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            joining, gone = self._next(), [key for key, each in self._talking.items() if each.left]
            if not joining and not self._talking:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            for key in gone:
                del self._talking[key]
            started = perf_counter()
            for each in joining:
                self._talking[each.asked.key] = each
                each.joined = each.joined or started
                self._meters.observe("fmray_queue_seconds", started - each.since, model=self._name)
            turn = await loop.run_in_executor(
                self._device, self._turn, gone, [each.asked for each in joining]
            )
            took = perf_counter() - started
            self._meters.observe("fmray_infer_seconds", took, model=self._name)
            self._meters.observe("fmray_batch_items", max(1, len(self._talking)), model=self._name)
            self.admission.answered(1, took * self._longest() / max(1, len(self._talking)))
            self._tell(turn)

    def _next(self) -> list[_Listener]:
        """Those who wait, first come first, as many as there is room for."""
        staying = sum(not each.left for each in self._talking.values())
        room = min(JOIN_AT_ONCE, self._running.max_rows - staying)
        joining: list[_Listener] = []
        while self._waiting and len(joining) < room:
            listener = self._waiting.popleft()
            if not listener.left:
                joining.append(listener)
        return joining

    def _longest(self) -> float:
        """Tokens of an answer, about: what one more conversation will take at the present pace."""
        return max((each.asked.options.max_new_tokens for each in self._talking.values()), default=1)

    def _tell(self, turn: _Turn) -> None:
        now = perf_counter()
        for token in turn.tokens:
            listener = self._talking.get(token.key)
            if listener is None:
                continue
            if token.finished is not None:
                del self._talking[token.key]
            if listener.repeated < listener.told:
                listener.repeated += 1
                continue
            if not listener.told:
                self._meters.observe("fmray_first_token_seconds", now - listener.since, model=self._name)
            listener.told += 1
            listener.repeated = listener.told
            if token.finished == "failed":
                logger.error("an answer of %s failed: %s", self._name, token.error)
                listener.inbox.put_nowait(RequestError(500, "model_failed", FAILED))
            else:
                listener.inbox.put_nowait(token)
        for key, error in turn.failed.items():
            self._meters.count("fmray_rejected_total", model=self._name, reason=error.code)
            if (failed := self._talking.pop(key, None)) is not None:
                failed.inbox.put_nowait(error)
        for key in turn.again:
            if (waiting := self._talking.pop(key, None)) is not None:
                waiting.repeated = 0
                self._waiting.appendleft(waiting)

    # -------------------------------------------------------------------------------------- in the model's own thread

    def _turn(self, gone: Sequence[Hashable], joining: Sequence[Asked]) -> _Turn:
        """Some leave, some join, all say a token."""
        turn = _Turn()
        self._running.leave(gone)
        self._join(joining, turn)
        self._step(turn)
        return turn

    def _join(self, joining: Sequence[Asked], turn: _Turn) -> None:
        if not joining:
            return
        try:
            turn.tokens += self._running.join(joining)
        except MODEL_FAILURES as error:
            if len(joining) > 1:  # one is to blame, or they are too many for the memory
                half = len(joining) // 2
                self._join(joining[:half], turn)
                self._join(joining[half:], turn)
                return
            key = joining[0].key
            if isinstance(error, DataError):
                turn.failed[key] = RequestError(400, "invalid_value", str(error), "messages")
            elif is_out_of_memory(error) and self._running.rows:
                turn.again.append(key)
            else:
                logger.error("a conversation failed in the model of %s", self._name, exc_info=error)
                turn.failed[key] = RequestError(500, "model_failed", FAILED)

    def _step(self, turn: _Turn) -> None:
        while self._running.rows:
            try:
                turn.tokens += self._running.step()
                return
            except MODEL_FAILURES as error:
                keys = self._running.keys
                out_of_memory = is_out_of_memory(error)
                if out_of_memory and len(keys) > 1:
                    turn.again.append(keys[-1])  # the newest has the least to say again
                    self._running.leave(keys[-1:])
                    continue
                logger.error("all answers of %s failed", self._name, exc_info=error)
                code = "out_of_memory" if out_of_memory else "model_failed"
                turn.failed |= dict.fromkeys(keys, RequestError(500, code, FAILED))
                self._running.leave(keys)

    # --------------------------------------------------------------------------------------------------------- end

    async def drained(self) -> None:
        """Waits until every request that has found this model has left."""
        while not self.admission.empty:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """End the threads; whoever still listens is told."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        for listener in [*self._waiting, *self._talking.values()]:
            listener.inbox.put_nowait(RequestError(503, "shutting_down", CLOSED, retry_after=1.0))
        self._waiting.clear()
        self._talking.clear()
        self.admission.close()
        self._device.shutdown(wait=False, cancel_futures=True)


def _asked(key: int, item: ChatItem) -> Asked:
    return Asked(key, item.dialogue, item.pictures, item.options)
