"""A VQA model or a multimodal LLM behind an endpoint: conversations with pictures to answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from fmray.errors import CheckpointError, RequestError
from fmray.models.answering import Answering, Said
from fmray.serving.conversations import ChatAsk
from fmray.serving.engines import Capabilities, ServingEngine
from fmray.serving.images import pixels_of
from fmray.types import Dialogue, Pictures, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCapabilities(Capabilities):
    """Those of a model that answers."""

    answer_tokens: int
    """Longest answer where a request names no limit."""


@dataclass(frozen=True, slots=True)
class ChatInputs:
    """Conversations and their distinct pictures, decoded."""

    asks: tuple[ChatAsk, ...]
    pictures: Pictures


class ChatEngine(ServingEngine[ChatAsk, Any, Any, Said], Protocol):
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

    def prepare(self, asks: Sequence[ChatAsk]) -> ChatInputs:
        """Pictures to uint8 squares. Raises RequestError(400) for one that is damaged, for a conversation that this model does
        not read or that is too long for it, and where a longer answer is asked for than there is room for.
        """
        for ask in asks:
            self._check_shape(ask.dialogue)
            self._check_length(ask)
        images = {key: image for ask in asks for key, image in ask.images.items()}
        encoded = [(image.image, image.name) for image in images.values()]
        pixels = pixels_of(encoded, self._answering.image, max_pixels=self._max_pixels)
        return ChatInputs(tuple(asks), Pictures(tuple(images), pixels))

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

    def forward(self, inputs: ChatInputs) -> list[Said]:
        """Answers on the model's device, those of one length together."""
        said: dict[int, Said] = {}
        for length in dict.fromkeys(ask.max_new_tokens for ask in inputs.asks):
            places = [place for place, ask in enumerate(inputs.asks) if ask.max_new_tokens == length]
            dialogues = [inputs.asks[place].dialogue for place in places]
            used = dict.fromkeys(key for dialogue in dialogues for key in dialogue.pictures)
            pictures = _some(inputs.pictures, tuple(used))
            answers = self._answering.answer(dialogues, pictures, max_new_tokens=length)
            said.update(zip(places, answers, strict=True))
        return [said[place] for place in range(len(inputs.asks))]

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

    def finish(self, outputs: list[Said]) -> list[Said]:
        """The answers."""
        return outputs


def _some(pictures: Pictures, keys: tuple[str, ...]) -> Pictures:
    """Those pictures alone: a tower does not read one that nobody asks about."""
    pixels = pictures.pixels_NCHW
    return replace(
        pictures,
        keys=keys,
        pixels_NCHW=None if pixels is None or not keys else pixels[pictures.rows(keys)],
    )
