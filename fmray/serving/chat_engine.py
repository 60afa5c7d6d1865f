"""A VQA model or a multimodal LLM behind an endpoint: conversations with pictures to answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from fmray.errors import CheckpointError, RequestError
from fmray.models.answering import Answering, Said
from fmray.serving.asks import ImageAsk
from fmray.serving.conversations import ChatAsk
from fmray.serving.engines import BatchEngine, Capabilities, Prepared
from fmray.serving.images import pixels_of
from fmray.types import Dialogue, Pictures, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCapabilities(Capabilities):
    """Those of a model that answers."""

    answer_tokens: int
    """Longest answer where a request names no limit."""


@dataclass(frozen=True, slots=True)
class ChatItem:
    """A conversation and its decoded pictures, uint8 [3, S, S], by the digests of their bytes."""

    ask: ChatAsk
    pixels: dict[str, Tensor]


class ChatEngine(BatchEngine[ChatAsk, ChatItem, Said], Protocol):
    """What `/v1/chat/completions` needs."""

    @property
    def capabilities(self) -> AnswerCapabilities: ...


class AnswerEngine:
    """Either family through what they share (`fmray.models.answering`)."""

    max_batch = 8

    def __init__(self, answering: Answering, kind: Literal["vqa", "mllm"], *, max_pixels: int) -> None:
        self._answering = answering
        self._max_pixels = max_pixels
        self._limits = answering.limits
        self.capabilities = AnswerCapabilities(
            kind=kind,
            modalities=("text", "image"),
            output="text",
            max_tokens=self._limits.prompt_tokens,
            image_size=answering.image.size,
            answer_tokens=self._limits.answer_tokens,
        )

    def warmup(self) -> None:
        """An answer about a grey picture; raises CheckpointError where the model's numbers are not finite."""
        side = self.capabilities.image_size
        grey = Pictures(("grey",), torch.full((1, 3, side, side), 128, dtype=torch.uint8))
        dialogue = Dialogue("warm-up", ("grey",), (Turn(("", "what is this?"), "a picture"),))
        likelihood_B, _ = self._answering.likelihood([dialogue], grey)
        if not torch.isfinite(likelihood_B).all():
            raise CheckpointError("the model's answers are not finite: its weights are damaged")
        self._answering.answer([dialogue], grey)

    @property
    def probe(self) -> ChatAsk:
        """A question about a grey picture; its answer is one token long."""
        side = self.capabilities.image_size
        encoded = io.BytesIO()
        Image.new("L", (side, side), 128).save(encoded, "PNG")
        dialogue = Dialogue("probe", ("grey",), (Turn(("", "what is this?"), ""),))
        return ChatAsk(dialogue, {"grey": ImageAsk(encoded.getvalue(), "probe")}, max_new_tokens=1)

    def prepare(self, ask: ChatAsk) -> Prepared[ChatItem]:
        """Pictures to uint8 squares. Raises RequestError(400) for one that is damaged, for a conversation that this model does
        not read or that is too long for it, and where a longer answer is asked for than there is room for.
        """
        self._check_shape(ask.dialogue)
        self._check_length(ask)
        pixels = {}
        for key, image in ask.images.items():
            square = pixels_of(
                [(image.image, image.name)], self._answering.image, max_pixels=self._max_pixels
            )
            assert square is not None
            pixels[key] = square[0]
        size = sum(square.numel() for square in pixels.values())
        return Prepared(ChatItem(ask, pixels), ask.max_new_tokens, size)

    def collate(self, items: Sequence[ChatItem]) -> tuple[list[ChatItem], Pictures]:
        """The conversations and their distinct pictures."""
        pixels = {key: square for item in items for key, square in item.pixels.items()}
        return list(items), Pictures(tuple(pixels), torch.stack([*pixels.values()]) if pixels else None)

    def _check_shape(self, dialogue: Dialogue) -> None:
        """Raises RequestError(400) where this model cannot read such a conversation at all."""
        if dialogue.system and not self._limits.system:
            if self._limits.one_question:
                message = "this model answers one question about one picture: it takes no system message"
            else:
                message = (
                    "this model's template has no place for a system message: say it in the first question"
                )
            raise RequestError(400, "invalid_value", message, "messages[0]")
        if not self._limits.one_question:
            return
        counts = (len(dialogue.turns), "questions"), (len(dialogue.pictures), "pictures")
        for count, what in counts:
            if count != 1:
                message = f"this model answers one question about one picture: the request has {count} {what}"
                raise RequestError(400, "invalid_value", message, "messages")
        if not dialogue.question:
            message = "this model answers one question about one picture: the request has no question"
            raise RequestError(400, "empty_input", message, "messages")

    def forward(self, batch: tuple[list[ChatItem], Pictures]) -> list[Said]:
        """Answers of one longest length, on the model's device."""
        items, pictures = batch
        dialogues = [item.ask.dialogue for item in items]
        return self._answering.answer(dialogues, pictures, max_new_tokens=items[0].ask.max_new_tokens)

    def _check_length(self, ask: ChatAsk) -> None:
        tokens = self._answering.prompt_tokens(ask.dialogue)
        if tokens > self._limits.prompt_tokens:
            what = "the question has" if self._limits.one_question else "messages have"
            message = f"{what} {tokens} tokens, this model reads {self._limits.prompt_tokens}; send less"
            raise RequestError(400, "context_length_exceeded", message, "messages")
        room = self._answering.answer_room(tokens)
        if ask.max_new_tokens is not None and ask.max_new_tokens > room:
            name = ask.length_option
            message = (
                f"{name}={ask.max_new_tokens}: behind {tokens} tokens of messages there is room for {room}"
            )
            raise RequestError(400, "context_length_exceeded", message, name)
