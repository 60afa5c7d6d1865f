"""`/v1/chat/completions`: a conversation about pictures to an answer.

A request: route (here) -> EngineRunner.answer -> AnswerEngine.forward -> Answering.answer -> the model.
"""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter

from fmray.config.serving import ServeConfig
from fmray.errors import RequestError
from fmray.models.answering import Said
from fmray.serving.chat_engine import AnswerCapabilities
from fmray.serving.chat_schemas import (
    AnswerMessage,
    ChatReply,
    ChatRequest,
    ChatUsage,
    Choice,
    check_options,
)
from fmray.serving.conversations import ChatAsk, ChatLimits, read_conversation
from fmray.serving.engines import EngineRunner
from fmray.serving.model_routes import ModelRoutes

MIB = 2**20


class ChatRoutes:
    """`/v1/chat/completions` of one model."""

    def __init__(
        self,
        runner: EngineRunner[ChatAsk, Said],
        capabilities: AnswerCapabilities,
        config: ServeConfig,
    ) -> None:
        self._runner = runner
        self._limits = ChatLimits(config.max_inputs, config.max_images, config.max_image_mib * MIB)
        self._model = ModelRoutes(
            capabilities,
            config,
            routes=("/v1/chat/completions",),
            limits={"inputs": config.max_inputs, "images": config.max_images},
            max_answer_tokens=capabilities.answer_tokens,
        )

    def add_to(self, router: APIRouter) -> None:
        """This route and those that every model has."""
        self._model.add_to(router)
        router.post("/v1/chat/completions")(self.completions)

    async def completions(self, body: ChatRequest) -> ChatReply:
        """What the model says to the last message; greedy, whole, one answer."""
        self._model.check(body.model)
        check_options(body)
        length, option = body.longest
        dialogue, images = await self._runner.on_cpu(read_conversation, body.messages, self._limits)
        (said,) = await self._runner.answer([ChatAsk(dialogue, images, length, option)])
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
