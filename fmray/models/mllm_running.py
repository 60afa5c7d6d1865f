"""A multimodal LLM's side of continuous batching.

K dialogues that join  P prompt tokens  N distinct pictures  D width of the words
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from fmray.models.answering import Said, check_room
from fmray.models.decoding.generate import Decoder
from fmray.models.decoding.rows import prompt_rows
from fmray.models.decoding.running import Asked
from fmray.models.decoding.spelling import Spelling
from fmray.models.mllm_lines import as_line, left_padded
from fmray.models.mllm_output import shown
from fmray.models.packing import Line
from fmray.models.vqa_answering import resting
from fmray.types import Pictures

if TYPE_CHECKING:
    from fmray.models.mllm_answering import MllmAnswering


@dataclass(frozen=True, slots=True)
class _Prompt:
    line: Line
    projected_NPD: Tensor | None
    """Its own pictures, where an answer may be a picture too: what that should show is read in a pass over everything."""


class MllmSpeaker:
    """`running.Speaker` with the rows of a decoder."""

    def __init__(self, answering: MllmAnswering, decoder: Decoder) -> None:
        self._answering, self._model, self._renderer = answering, answering.model, answering.renderer
        self.rows = prompt_rows(decoder)
        self.stops = frozenset((self._renderer.end_id, *self._renderer.routing_ids[:1]))
        self.spelling = Spelling(answering.tokenizer)

    def begin(self, asked: Sequence[Asked], pictures: Pictures) -> tuple[list[_Prompt], Tensor]:
        model, lines = self._model, []
        for each in asked:
            spans = self._renderer.fitted(each.dialogue, model.config.max_tokens, answer=False)
            lines.append(as_line(each.dialogue, spans, pictures))
            room = self._answering.answer_room(len(lines[-1].ids))
            check_room(each.dialogue.name, each.options.max_new_tokens, room)
        ids_KP, mask_KP = (tensor.to(model.device) for tensor in left_padded(lines))
        with resting(model):
            projected_NPD = model.projected(None, pictures.features_NPF)
            words_KPD, memory = self._answering.prompts(ids_KP, mask_KP, lines, projected_NPD)
            logits_KV = self.rows.join(ids_KP, mask_KP, words_KPD, memory)
        return [self._prompt(line, projected_NPD) for line in lines], logits_KV

    def _prompt(self, line: Line, projected_NPD: Tensor | None) -> _Prompt:
        if self._model.output is None or projected_NPD is None or not line.pictures:
            return _Prompt(line, None)
        own = replace(line, pictures=tuple(range(len(line.pictures))))
        return _Prompt(own, projected_NPD[list(line.pictures)])

    def decode(self, ids: Sequence[int]) -> str:
        return self._renderer.words(ids)

    def said(self, prompt: _Prompt, ids: Sequence[int]) -> Said:
        with resting(self._model):
            (embed,) = shown(self._model, self._answering.prompts, [prompt.line], [ids], prompt.projected_NPD)
        return self._answering.said(ids, prompt.line, embed)
