"""A VQA model or a multimodal LLM behind an endpoint: conversations with pictures, read and begun."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from fmray.errors import CheckpointError, RequestError
from fmray.models.answering import Answering
from fmray.models.decoding.choice import AnswerOptions
from fmray.models.decoding.running import Running
from fmray.serving.asks import ImageAsk
from fmray.serving.conversations import ChatAsk
from fmray.serving.engines import Capabilities, Prepared
from fmray.serving.images import pixels_of
from fmray.types import Dialogue, Pictures, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCapabilities(Capabilities):
    """Those of a model that answers."""

    answer_tokens: int
    """Longest answer where a request names no limit."""


@dataclass(frozen=True, slots=True)
class ChatItem:
    """A conversation that can begin."""

    dialogue: Dialogue
    pictures: Pictures
    """uint8 pixels, by the digests of their bytes."""
    options: AnswerOptions


class AnswerEngine:
    """Either family through what they share (`fmray.models.answering`)."""

    max_rows = 32
    """Answers that are said at the same time."""

    def __init__(self, answering: Answering, kind: Literal["vqa", "mllm"], *, max_pixels: int) -> None:
        answering.model.requires_grad_(False)
        answering.hold_locked_parts()  # nothing learns here: a question that comes again costs no tower
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

    @property
    def probe(self) -> ChatAsk:
        """A question about a grey picture; its answer is one token long."""
        side = self.capabilities.image_size
        encoded = io.BytesIO()
        Image.new("L", (side, side), 128).save(encoded, "PNG")
        dialogue = Dialogue("probe", ("grey",), (Turn(("", "what is this?"), ""),))
        return ChatAsk(dialogue, {"grey": ImageAsk(encoded.getvalue(), "probe")}, max_new_tokens=1)

    def warmup(self) -> None:
        """An answer about a grey picture; raises CheckpointError where the model's numbers are not finite."""
        side = self.capabilities.image_size
        grey = Pictures(("grey",), torch.full((1, 3, side, side), 128, dtype=torch.uint8))
        dialogue = Dialogue("warm-up", ("grey",), (Turn(("", "what is this?"), "a picture"),))
        likelihood_B, _ = self._answering.likelihood([dialogue], grey)
        if not torch.isfinite(likelihood_B).all():
            raise CheckpointError("the model's answers are not finite: its weights are damaged")
        self._answering.answer([dialogue], grey)

    def running(self, max_rows: int) -> Running:
        """Answers that are being said: none yet."""
        return self._answering.running(max_rows)

    def prepare(self, ask: ChatAsk) -> Prepared[ChatItem]:
        """Pictures to uint8 squares, on the CPU, in any thread.

        Raises RequestError(400) for a picture that is damaged, for a conversation that this model does not read or that is too
        long for it, and where a longer answer is asked for than there is room for.
        """
        self._check_shape(ask.dialogue)
        longest = self._checked_length(ask)
        encoded = [(image.image, image.name) for image in ask.images.values()]
        pixels = pixels_of(encoded, self._answering.image, max_pixels=self._max_pixels)
        options = AnswerOptions(longest, ask.temperature, ask.top_p, ask.seed, ask.top_logprobs)
        item = ChatItem(ask.dialogue, Pictures(tuple(ask.images), pixels), options)
        return Prepared(item, "conversation", 0 if pixels is None else pixels.numel())

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

    def prompt_tokens(self, ask: ChatAsk) -> int:
        """What is read before the answer."""
        return self._answering.prompt_tokens(ask.dialogue)

    def _checked_length(self, ask: ChatAsk) -> int:
        """Tokens of the longest answer."""
        tokens = self.prompt_tokens(ask)
        if tokens > self._limits.prompt_tokens:
            what = "the question has" if self._limits.one_question else "messages have"
            message = f"{what} {tokens} tokens, this model reads {self._limits.prompt_tokens}; send less"
            raise RequestError(400, "context_length_exceeded", message, "messages")
        room = self._answering.answer_room(tokens)
        if ask.max_new_tokens is None:
            return min(self._limits.answer_tokens, room)
        if ask.max_new_tokens > room:
            name = ask.length_option
            message = (
                f"{name}={ask.max_new_tokens}: behind {tokens} tokens of messages there is room for {room}"
            )
            raise RequestError(400, "context_length_exceeded", message, name)
        return ask.max_new_tokens
