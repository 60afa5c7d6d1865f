"""A VQA model's side of continuous batching.

K questions that join  N distinct pictures  Q distinct questions  P tokens of a picture  S tokens of a question  D width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmray.models.answering import Said, check_room
from fmray.models.decoding.memory import MemoryGpt2Decoder, MemoryRows
from fmray.models.decoding.running import Asked
from fmray.models.decoding.spelling import Spelling
from fmray.types import Pictures

if TYPE_CHECKING:
    from fmray.models.vqa_answering import VqaAnswering


class VqaSpeaker:
    """`running.Speaker`: each row's memory is its picture's tokens and its question's, or their mean."""

    def __init__(self, answering: VqaAnswering) -> None:
        self._answering, self._model = answering, answering.model
        config = answering.model.config
        self.rows = MemoryRows(MemoryGpt2Decoder(answering.model.decoder, "fp32"), config.start_id)
        self.stops = frozenset((config.end_id,))
        self.spelling = Spelling(answering.answer_tokenizer)

    def begin(self, asked: Sequence[Asked], pictures: Pictures) -> tuple[list[int], Tensor]:
        dialogues = [each.dialogue for each in asked]
        for each in asked:
            check_room(each.dialogue.name, each.options.max_new_tokens, self._answering.answer_room(0))
        seen_NPD, asked_QSD, mask_QS, picture_of_K, question_of_K = self._answering.sides(dialogues, pictures)
        if self._model.config.fusion == "mean":
            fused = self._model.fused(seen_NPD, asked_QSD, mask_QS, picture_of_K, question_of_K)
            assert fused.last_hidden_state is not None
            parts = [(fused.last_hidden_state, torch.arange(len(asked), device=seen_NPD.device))]
            lengths = [1] * len(asked)
        else:
            parts = [(seen_NPD, picture_of_K), (asked_QSD, question_of_K)]
            lengths = (seen_NPD.shape[1] + mask_QS.sum(dim=1)[question_of_K]).tolist()
        read = [self._answering.question_length(dialogue) for dialogue in dialogues]
        return read, self.rows.begin(parts, lengths)

    def decode(self, ids: Sequence[int]) -> str:
        return self._answering.words(ids)

    def said(self, prompt: int, ids: Sequence[int]) -> Said:
        return self._answering.said(ids, prompt)
