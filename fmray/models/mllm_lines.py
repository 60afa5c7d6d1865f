"""A multimodal LLM's dialogues as lines of tokens and as tensors: what stands between the renderer's spans and the packed rows.

B dialogues  P prompt tokens  R rows  K pictures of a row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.errors import DataError
from fmray.models.conversation import Span
from fmray.models.packing import Line, Packed
from fmray.types import Dialogue, Pictures


def as_line(dialogue: Dialogue, spans: Sequence[Span], pictures: Pictures) -> Line:
    """A dialogue's spans as tokens, its pictures as rows of the batch's; raises DataError where one is not there."""
    ids: list[int] = []
    learns: list[bool] = []
    starts, keys = [], []
    for span in spans:
        if span.picture is not None:
            starts.append(len(ids))
            keys.append(span.picture)
        ids += span.ids
        learns += [span.learns] * len(span.ids)
    missing = [key for key in keys if key not in pictures.keys]
    if missing:
        raise DataError(f"dialogue '{dialogue.name}': its picture '{missing[0]}' was not given")
    return Line(tuple(ids), tuple(learns), tuple(starts), tuple(pictures.rows(keys)))


def last_answer(dialogue: Dialogue, spans: Sequence[Span]) -> list[Span]:
    """Only the last turn's answer and its end are scored; raises DataError where it did not fit."""
    last = len(dialogue.turns) - 1
    if not any(span.learns and span.turn == last for span in spans):
        raise DataError(f"dialogue '{dialogue.name}': has no last answer within model.max_tokens to score")
    return [replace(span, learns=span.learns and span.turn == last) for span in spans]


def left_padded(lines: Sequence[Line]) -> tuple[Tensor, Tensor]:
    """Prompts' tokens and mask, int64 [B, P]."""
    longest = max(len(line.ids) for line in lines)
    ids = [[0] * (longest - len(line.ids)) + list(line.ids) for line in lines]
    mask = [[0] * (longest - len(line.ids)) + [1] * len(line.ids) for line in lines]
    return torch.tensor(ids), torch.tensor(mask)


def memory_inputs(packed: Packed) -> dict[str, Tensor]:
    """What words look at; at least one column, which none sees where there is no picture, so that the layers run."""
    missing = 1 if not packed.memory_RK.shape[1] else 0
    pads = [
        F.pad(packed.memory_RK, (0, missing), value=-1),
        F.pad(packed.memory_group_RK, (0, missing), value=-2),
        F.pad(packed.memory_place_RK, (0, missing), value=0),
    ]
    names = ("memory_pictures", "memory_group", "memory_place")
    return {**dict(zip(names, pads, strict=True)), "seen": packed.seen_RL}


def until(ids: Sequence[int], end: int) -> list[int]:
    """Up to the end and with it; beams are filled up behind theirs."""
    return list(ids[: ids.index(end) + 1] if end in ids else ids)
