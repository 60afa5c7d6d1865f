"""Prompts as a policy reads them: token ids by its own template, and pictures as pixels.

B prompts  C,H,W pixels
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fmray.config.prompts import PromptConfig, QuestionPromptSource
from fmray.data.dialogue_loader import decoded_pictures
from fmray.data.prompts import Prompt, fit_prompt
from fmray.errors import ConfigError
from fmray.models.language import Language
from fmray.models.mllm_answering import MllmAnswering

T = TypeVar("T")

REMEMBERED = 512 * 2**20
"""Bytes of decoded pictures that are kept."""


@dataclass(slots=True)
class PromptReader:
    """`PromptReader(config.prompts, language)`; what it decoded it remembers, until its room is full."""

    config: PromptConfig
    language: Language
    _decoded: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ConfigError where questions about pictures go to a policy that sees none."""
        if isinstance(self.config.source, QuestionPromptSource):
            self._seeing()

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Its token ids; a question's as its model was taught to read it, placeholders of the picture among them.

        Raises DataError where it does not fit.
        """
        if prompt.dialogue is None:
            ending = self.config.template.partition("{}")[2]
            return tuple(fit_prompt(prompt.text, self.language.tokenizer, self.config.max_tokens, ending))
        answering = self._seeing()
        spans = answering.renderer.fitted(prompt.dialogue, answering.model.config.max_tokens, answer=False)
        return tuple(token for span in spans for token in span.ids)

    def pixels(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """Each prompt's picture, uint8 [B, 3, H, W]; None where they have none. Raises DataError that names an unreadable one."""
        pictures = together(self._pixels(prompt) for prompt in prompts)
        return None if pictures is None else torch.stack(pictures)

    def _pixels(self, prompt: Prompt) -> Tensor | None:
        if prompt.picture is None or prompt.source is None:
            return None
        place = id(prompt.source), prompt.picture  # two splits may call their pictures alike
        if place in self._decoded:
            return self._decoded[place]
        decoded = decoded_pictures(prompt.source, [prompt.picture], self._seeing().image).pixels_NCHW
        assert decoded is not None
        if (len(self._decoded) + 1) * decoded[0].numel() <= REMEMBERED:
            self._decoded[place] = decoded[0]
        return decoded[0]

    def _seeing(self) -> MllmAnswering:
        if self.language.answering is None:
            kind = self.language.model.config.model_type
            cure = f"asks about pictures, which a {kind} policy does not see: take a multimodal LLM"
            raise ConfigError("prompts.source.kind", self.config.source.kind, cure)
        return self.language.answering


def together(values: Iterable[T | None]) -> tuple[T, ...] | None:
    """All of them; None where one is not there."""
    found = []
    for value in values:
        if value is None:
            return None
        found.append(value)
    return tuple(found)
