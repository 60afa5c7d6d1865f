"""Texts of like length in one batch, as a pure function of (seed, step), for any number of ranks and any point of resume.

The stream of positions 0, 1, 2, … runs through one shuffled epoch after the other, as that of `data.loader`. It is cut into
windows of W batches; a window's rows are sorted by length and cut into batches, whose order is drawn by (seed, window). Step k
takes batch k mod W of window k div W; rank r of R takes every R-th of its rows, so that ranks have equally much to do.

B rows of a rank  N their texts  T tokens  K texts of a row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmray.data.loader import epoch_order
from fmray.data.verdicts import Verdict

TokenRows = list[tuple[list[int], ...]]
"""Of each row the token ids of its texts."""


@dataclass(frozen=True, slots=True)
class VerdictBatch:
    """Rows ready for a scorer."""

    ids_NT: Tensor
    """int64 [N, T], right-padded; the texts of row 0, then those of row 1, …"""
    mask_NT: Tensor
    """int64 [N, T], 1 at real tokens."""
    place_BK: Tensor
    """int64 [B, K]: which of the N texts is the row's k-th; 0 where there is none."""
    there_BK: Tensor
    """bool [B, K]."""
    label_B: Tensor
    """int64 [B]; -1 where texts are compared."""
    margin_B: Tensor
    """float32 [B]."""

    def __len__(self) -> int:
        return self.place_BK.shape[0]

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)
        }
        return replace(self, **moved)

    def by_row(self, score_N: Tensor) -> Tensor:
        """The texts' scores as [B, K]; where there is no text, `there_BK` says so and the value means nothing."""
        return score_N[self.place_BK]


@dataclass
class LengthBuckets:
    """Which rows stand in a step's batch. `LengthBuckets(lengths, batch_size=32, window=16, seed=0).rows(step=7)`."""

    lengths: Sequence[int]
    batch_size: int
    window: int
    seed: int
    _newest: tuple[int, NDArray[np.int64]] | None = None

    def rows(self, step: int) -> list[int]:
        """Indices of the step's rows over all ranks, from short to long."""
        window, place = divmod(step, self.window)
        if self._newest is None or self._newest[0] != window:
            self._newest = window, self._batches_of(window)
        return [int(index) for index in self._newest[1][place]]

    def epoch(self, step: int) -> int:
        """Epoch in which the step's window begins."""
        return step // self.window * self.window * self.batch_size // len(self.lengths)

    def _batches_of(self, window: int) -> NDArray[np.int64]:
        """Rows of a window's batches, [window, batch_size]."""
        size, count = self.window * self.batch_size, len(self.lengths)
        start, stop = window * size, (window + 1) * size
        stream = []
        for epoch in range(start // count, (stop - 1) // count + 1):
            order = epoch_order(count, self.seed, epoch)
            stream.append(order[max(start - epoch * count, 0) : stop - epoch * count])
        indices = np.concatenate(stream)
        by_length = indices[np.argsort(np.array(self.lengths)[indices], kind="stable")]
        batches = by_length.reshape(self.window, self.batch_size)
        # the high bit keeps these draws apart from those of the epochs' orders
        drawn = np.random.Generator(np.random.Philox(key=[self.seed | 1 << 63, window]))
        return batches[drawn.permutation(self.window)]


Tokenize = Callable[[list[str]], list[list[int]]]


def token_rows(verdicts: Sequence[Verdict], tokenize: Tokenize) -> TokenRows:
    """Every text's token ids, row by row."""
    flat = tokenize([text for verdict in verdicts for text in verdict.texts])
    rows, start = [], 0
    for verdict in verdicts:
        rows.append(tuple(flat[start : start + len(verdict.texts)]))
        start += len(verdict.texts)
    return rows


def collate(verdicts: Sequence[Verdict], rows: TokenRows, pad_id: int, margin: float) -> VerdictBatch:
    """A batch padded to its longest text; `margin` where a verdict has none of its own."""
    texts = [ids for row in rows for ids in row]
    ids_NT, mask_NT = right_padded(texts, pad_id)
    widest = max(map(len, rows))
    place_BK = torch.zeros(len(rows), widest, dtype=torch.int64)
    there_BK = torch.zeros(len(rows), widest, dtype=torch.bool)
    first = 0
    for index, row in enumerate(rows):
        place_BK[index, : len(row)] = torch.arange(first, first + len(row))
        there_BK[index, : len(row)] = True
        first += len(row)
    return VerdictBatch(
        ids_NT,
        mask_NT,
        place_BK,
        there_BK,
        torch.tensor([verdict.label for verdict in verdicts]),
        torch.tensor([margin if verdict.margin is None else verdict.margin for verdict in verdicts]),
    )


@dataclass
class VerdictLoader:
    """`VerdictLoader(…).batches(step)`: this rank's rows of a step, in micro-batches."""

    verdicts: Sequence[Verdict]
    rows: TokenRows
    buckets: LengthBuckets
    pad_id: int
    margin: float
    rank: int
    world_size: int
    micro_batch_size: int | None

    def batches(self, step: int) -> list[VerdictBatch]:
        """Equally many on every rank; each padded to its own longest text."""
        mine = self.buckets.rows(step)[self.rank :: self.world_size]
        size = self.micro_batch_size or len(mine)
        return [self._batch(mine[start : start + size]) for start in range(0, len(mine), size)]

    def _batch(self, rows: list[int]) -> VerdictBatch:
        chosen = [self.verdicts[row] for row in rows]
        return collate(chosen, [self.rows[row] for row in rows], self.pad_id, self.margin)


def right_padded(texts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [N, T], T the longest text's."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(texts):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, : len(tokens)] = 1
    return ids, mask
