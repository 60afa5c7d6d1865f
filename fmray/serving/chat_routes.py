"""`/v1/chat/completions`: a conversation about pictures to an answer, whole or as a stream.

A request: route (here) -> ChatLoop.tokens -> Running.step -> the model.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from fmray.errors import RequestError
from fmray.models.decoding.running import Spelled, Token
from fmray.serving.border import error_response
from fmray.serving.chat_engine import AnswerEngine
from fmray.serving.chat_schemas import (
    AnswerMessage,
    ChatChunk,
    ChatReply,
    ChatRequest,
    ChatUsage,
    Choice,
    ChunkChoice,
    Delta,
    FinishReason,
    Logprobs,
    TokenLogprob,
    TopLogprob,
    check_options,
)
from fmray.serving.conversations import ChatAsk
from fmray.serving.inbound import deadline_of
from fmray.serving.metrics import Meters
from fmray.serving.reading import Reader
from fmray.serving.schemas import JSON
from fmray.serving.shelf import AnsweringModel, Shelf
from fmray.serving.telling import Telling

EVENTS = "text/event-stream"


class Answer:
    """One request's answer as it comes: text told so far, tokens, how it ended."""

    def __init__(
        self, body: ChatRequest, tokens: AsyncGenerator[Token, None], engine: AnswerEngine, ask: ChatAsk
    ) -> None:
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.finish_reason: FinishReason = "stop"
        self.prompt_tokens, self.completion_tokens = 0, 0
        self._body, self._tokens = body, tokens
        self._engine, self._ask = engine, ask
        self._telling = Telling(body.stop or ())

    async def pieces(self) -> AsyncIterator[tuple[str, TokenLogprob | None]]:
        """Text that can be told, token by token, some of it empty; ends at a stop sequence. Raises RequestError."""
        async with aclosing(self._tokens) as tokens:
            async for token in tokens:
                if not self.completion_tokens:  # now it is known to be one that the model reads
                    self.prompt_tokens = self._engine.prompt_tokens(self._ask)
                self.completion_tokens += 1
                if token.said is not None and token.said.embedding_D is not None:
                    message = "the answer is a picture, which this endpoint does not send; ask for words"
                    raise RequestError(400, "unsupported_output", message, "messages")
                text = self._telling.add(token.text)
                if token.finished == "length" and not self._telling.stopped:
                    self.finish_reason = "length"
                if token.finished is not None:
                    text += self._telling.end()
                is_end = token.finished == "stop" and not token.text
                logprob = _token_logprob(token) if self._body.logprobs and not is_end else None
                yield text, logprob
                if self._telling.stopped:
                    return  # whoever ends the iteration ends the answer

    def usage(self) -> ChatUsage:
        """So far."""
        total = self.prompt_tokens + self.completion_tokens
        return ChatUsage(
            prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens, total_tokens=total
        )


class ChatRoutes:
    """The route, of every model on the shelf that answers."""

    def __init__(self, shelf: Shelf, reader: Reader, meters: Meters) -> None:
        self._shelf, self._reader, self._meters = shelf, reader, meters

    def add_to(self, router: APIRouter) -> None:
        """This route."""
        data = {"type": "string", "description": "A `ChatChunk`, a token each; the last one is `[DONE]`."}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        told: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {"schema": event}}}}
        router.post("/v1/chat/completions", response_model=ChatReply, responses=told)(self.completions)

    async def completions(self, body: ChatRequest, request: Request) -> Response:
        """What the model says to the last message: one answer, whole, or token by token with `stream`."""
        model = await self._shelf.answering(body.model, "/v1/chat/completions")
        check_options(body)
        ask = await self._ask(model, body, request)
        if body.stream:
            events = self._events(model, body, ask, request)
            first = await anext(
                events
            )  # what cannot be answered is refused with a status, before the stream begins
            return StreamingResponse(_with_first(first, events), media_type=EVENTS, headers=NO_BUFFERING)
        answer = Answer(body, model.loop.tokens(ask, deadline_of(request)), model.loop.engine, ask)
        with model.loop.admission.visit():
            pieces = [piece async for piece in answer.pieces()]
        self._count(model, answer)
        logprobs = [logprob for _, logprob in pieces if logprob is not None]
        choice = Choice(
            message=AnswerMessage(content="".join(text for text, _ in pieces)),
            finish_reason=answer.finish_reason,
            logprobs=Logprobs(content=logprobs) if body.logprobs else None,
        )
        reply = ChatReply(
            id=answer.id, created=answer.created, model=body.model, choices=[choice], usage=answer.usage()
        )
        return Response(reply.model_dump_json(), media_type=JSON)

    async def _ask(self, model: AnsweringModel, body: ChatRequest, request: Request) -> ChatAsk:
        length, option = body.longest
        temperature = body.temperature or 0.0
        with model.loop.admission.visit():
            read = self._reader.conversation(request, model.loop.admission, body.messages)
            dialogue, images = await read
        return ChatAsk(
            dialogue,
            images,
            max_new_tokens=length,
            length_option=option,
            temperature=temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=secrets.randbits(62) if body.seed is None and temperature else body.seed or 0,
            top_logprobs=body.top_logprobs or 0,
        )

    async def _events(
        self, model: AnsweringModel, body: ChatRequest, ask: ChatAsk, request: Request
    ) -> AsyncGenerator[str, None]:
        answer = Answer(body, model.loop.tokens(ask, deadline_of(request)), model.loop.engine, ask)

        def event(choices: list[ChunkChoice], usage: ChatUsage | None = None) -> str:
            chunk = ChatChunk(
                id=answer.id, created=answer.created, model=body.model, choices=choices, usage=usage
            )
            return f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"

        begun = False
        with model.loop.admission.visit():
            try:
                async for text, logprob in answer.pieces():
                    if not begun:
                        begun = True
                        yield event([ChunkChoice(delta=Delta(role="assistant", content=""))])
                    if text or logprob is not None:
                        told = Logprobs(content=[] if logprob is None else [logprob])
                        shown = told if body.logprobs else None
                        yield event([ChunkChoice(delta=Delta(content=text), logprobs=shown)])
            except RequestError as error:
                if not begun:
                    raise
                yield f"data: {bytes(error_response(error).body).decode()}\n\n"
                return
        yield event([ChunkChoice(delta=Delta(), finish_reason=answer.finish_reason)])
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event([], answer.usage())
        self._count(model, answer)
        yield "data: [DONE]\n\n"

    def _count(self, model: AnsweringModel, answer: Answer) -> None:
        for direction, tokens in (("read", answer.prompt_tokens), ("said", answer.completion_tokens)):
            self._meters.count("fmray_tokens_total", tokens, model=model.id, direction=direction)


NO_BUFFERING = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Proxies pass events on as they come."""


async def _with_first(first: str, events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def _token_logprob(token: Token) -> TokenLogprob:
    chosen = _logprob(token.spelled)
    beside = [_logprob(each) for each in token.alternatives]
    return TokenLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=beside)


def _logprob(spelled: Spelled) -> TopLogprob:
    return TopLogprob(token=spelled.text, logprob=max(spelled.logprob, LEAST), bytes=list(spelled.octets))


LEAST = -9999.0
"""JSON has no infinity; OpenAI says -9999 too."""
