"""`/v1/chat/completions`: a conversation about pictures to an answer.

A request: route (here) -> Batcher.answer -> AnswerEngine.forward -> Answering.answer -> the model.
"""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request

from fmray.config.serving import ServeConfig
from fmray.errors import RequestError
from fmray.serving.chat_schemas import (
    AnswerMessage,
    ChatReply,
    ChatRequest,
    ChatUsage,
    Choice,
    check_options,
)
from fmray.serving.conversations import ChatAsk, ChatLimits, read_conversation
from fmray.serving.inbound import deadline_of, note_times
from fmray.serving.shelf import Shelf

MIB = 2**20


class ChatRoutes:
    """`/v1/chat/completions` of every model on the shelf that answers."""

    def __init__(self, shelf: Shelf, config: ServeConfig) -> None:
        self._shelf = shelf
        self._limits = ChatLimits(config.max_inputs, config.max_images, config.max_image_mib * MIB)

    def add_to(self, router: APIRouter) -> None:
        """This route."""
        router.post("/v1/chat/completions")(self.completions)

    async def completions(self, body: ChatRequest, request: Request) -> ChatReply:
        """What the model says to the last message; greedy, whole, one answer."""
        model = self._shelf.answering(body.model, "/v1/chat/completions")
        check_options(body)
        length, option = body.longest
        with model.batcher.admission.visit():
            read = model.batcher.admission.on_cpu
            dialogue, images = await read(read_conversation, body.messages, self._limits)
            ask = ChatAsk(dialogue, images, length, option)
            answered = await model.batcher.answer([ask], deadline_of(request))
        note_times(request, answered)
        (said,) = answered.replies
        if said.embedding_D is not None:
            message = "the answer is a picture, which this endpoint does not send; ask for words"
            raise RequestError(400, "unsupported_output", message, "messages")
        choice = Choice(
            message=AnswerMessage(content=said.text), finish_reason="stop" if said.ended else "length"
        )
        usage = ChatUsage(
            prompt_tokens=said.prompt_tokens,
            completion_tokens=said.tokens,
            total_tokens=said.prompt_tokens + said.tokens,
        )
        return ChatReply(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=body.model,
            choices=[choice],
            usage=usage,
        )
