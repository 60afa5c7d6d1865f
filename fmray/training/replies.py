"""What pictures that answer should show, for training: a dual encoder's embeddings, made once for each caption and picture.

K pictures that answer  D width of the dual encoder's space
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fmray.data.dialogues import DialogueSource
from fmray.evaluation.embed import embed_texts
from fmray.evaluation.replies import embed_keys, load_clip_of
from fmray.models.answering import Answering
from fmray.models.mllm_answering import MllmAnswering
from fmray.models.mllm_output import Wanted
from fmray.models.saved import LoadedDualEncoder


@dataclass
class ReplyEmbeddings:
    """`ReplyEmbeddings(encoder, source)([("dog face", "train/17"), ("haunted house", "")])`: float32 [2, 2, D] on the CPU."""

    encoder: LoadedDualEncoder
    source: DialogueSource
    _texts: dict[str, Tensor] = field(default_factory=dict)
    _pictures: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, wanted: Sequence[Wanted]) -> Tensor:
        """Words, then pictures, of norm 1; zeros where nobody has the picture. Raises DataError where one cannot be read."""
        texts = [text for text in dict.fromkeys(text for text, _ in wanted) if text not in self._texts]
        keys = [key for key in dict.fromkeys(key for _, key in wanted) if key and key not in self._pictures]
        with torch.no_grad():
            if texts:
                self._texts |= dict(zip(texts, embed_texts(self.encoder, texts).cpu(), strict=True))
            if keys:
                embeds = embed_keys(self.encoder, self.source, keys).cpu()
                self._pictures |= dict(zip(keys, embeds, strict=True))
        width = int(self.encoder.model.config.embed_dim)
        nobodys = torch.zeros(width)
        rows = [torch.stack([self._texts[text], self._pictures.get(key, nobodys)]) for text, key in wanted]
        return torch.stack(rows) if rows else torch.zeros(0, 2, width)


def remember_replies(answering: Answering, source: DialogueSource, device: torch.device) -> None:
    """Give a model with an output side what it learns from; nothing happens to others. Raises CheckpointError, ConfigError."""
    if isinstance(answering, MllmAnswering) and answering.model.output is not None:
        answering.reply_targets = ReplyEmbeddings(load_clip_of(answering, device), source)
