"""Which sample stands where: batches as a pure function of (seed, step), for any number of ranks and any point of resume.

The stream of positions 0, 1, 2, … runs through one shuffled epoch after the other. Step k takes positions [k·B, (k+1)·B), rank r
of W its r-th slice of them. So nothing has to be saved but the step, a run resumes in the middle of an epoch on another number of
workers, and every random choice (caption, augmentation, background) is seeded by (seed, position).

B samples of this rank's batch  T tokens  C,H,W pixels
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fmray.config.schema import DataConfig, ImageConfig
from fmray.data.sources import Source
from fmray.data.transforms import augment, compose, decode_rgba, random_backgrounds, white
from fmray.errors import DataError
from fmray.types import ImageTextBatch

MEBIBYTE = 1 << 20
Read = TypeVar("Read")
Decoded = tuple[Tensor, tuple[str, ...]]
"""A picture, uint8 [4, S, S], and its captions."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the loader uses."""

    pad_token_id: int

    def __call__(self, text: list[str], *, truncation: bool, max_length: int) -> Any: ...


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1, a function of (seed, epoch): every epoch holds each sample once."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


_permutation = lru_cache(maxsize=4)(epoch_order)  # a batch may straddle two epochs


def position_seed(seed: int, position: int) -> int:
    """A 63-bit seed for everything random at one position."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def readable_at(
    position: int, count: int, seed: int, read: Callable[[int], Read]
) -> tuple[Read, tuple[str, ...]]:
    """What `read` makes of the item at a position; where that raises DataError, of the next readable one half an epoch further.

    With it why the position's own item could not be read, if so. The substitute depends on the position alone, so the
    batch is the same on any number of ranks. Raises DataError where not one of the `count` items can be read.
    """
    reasons: tuple[str, ...] = ()
    epoch, place = divmod(position, count)
    order = _permutation(count, seed, epoch)
    for attempt in range(count):
        index = int(order[place if attempt == 0 else (place + count // 2 + attempt) % count])
        try:
            return read(index), reasons
        except DataError as error:
            if attempt == 0:
                reasons = (str(error),)
    raise DataError(f"no picture of the data set can be read; the first: {reasons[0]}")


def positions_at(step: int, batch_size: int, rank: int, world_size: int) -> list[int]:
    """A rank's positions of the stream at a step: `positions_at(1, 6, 1, 2) == [9, 10, 11]`."""
    mine = batch_size // world_size
    start = step * batch_size + rank * mine
    return list(range(start, start + mine))


def loaded(dataset: Dataset[Read], batches: Sequence[list[int]], workers: int) -> Iterator[Read]:
    """`dataset.__getitems__` of each batch of positions in turn, by so many processes ahead of time; 0: in this one."""
    loader: DataLoader[Read] = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context="forkserver"
        if workers
        else None,  # fork would copy torch's threads, half alive
        prefetch_factor=2 if workers else None,
    )
    yield from loader


def _as_it_is(batch: Any) -> Any:
    return batch  # the dataset has collated it already


def caption_key(caption: str) -> int:
    """The same 63-bit number for the same caption in every process (Python's own hash is salted)."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, slots=True)
class LoadedBatch:
    """A rank's rows of one step, and what could not be read."""

    rows: ImageTextBatch
    epoch: int
    """Epoch of the first row."""
    bad: tuple[str, ...]
    """Unreadable samples of this rank's positions (name and reason); others took their places."""


@dataclass
class PairDataset(Dataset[LoadedBatch]):
    """Positions in, a finished batch out; lives in the learner's process or in each decoding process."""

    source: Source
    tokenizer: Tokenizer
    data: DataConfig
    image: ImageConfig
    seed: int
    pad_to: int | None = None
    """Pad captions to this length; None: to the longest of the batch."""
    _decoded: dict[int, Decoded] = field(default_factory=dict)
    _tokens: dict[str, list[int]] = field(default_factory=dict)

    def __getitems__(self, positions: list[int]) -> LoadedBatch:
        seeds = [position_seed(self.seed, position) for position in positions]
        pictures, captions = [], []
        bad: list[str] = []
        for position, seed in zip(positions, seeds, strict=True):
            (picture, choices), reasons = readable_at(position, len(self.source), self.seed, self._decode)
            pictures.append(picture)
            captions.append(choices[seed % len(choices)])
            bad += reasons
        token_ids_BT, mask_BT = self._tokenize(captions)
        keys = torch.tensor([caption_key(caption) for caption in captions], dtype=torch.int64)
        rows = ImageTextBatch(self._finish(torch.stack(pictures), seeds), token_ids_BT, mask_BT, keys)
        return LoadedBatch(rows, positions[0] // len(self.source), tuple(bad))

    def plain_rows(self, indices: list[int]) -> tuple[Tensor, list[tuple[str, ...]]]:
        """Samples as they are, over white: pixels uint8 [len, 3, S, S] and all captions; unreadable ones are left out."""
        pictures, captions = [], []
        for index in indices:
            try:
                picture, choices = self._decode(index)
            except DataError:  # counted and reported where the stream meets it
                continue
            pictures.append(picture)
            captions.append(choices)
        side = self.image.size
        rgba_B4HW = torch.stack(pictures) if pictures else torch.empty(0, 4, side, side, dtype=torch.uint8)
        return compose(rgba_B4HW, white(len(pictures))), captions

    def _decode(self, index: int) -> Decoded:
        """Picture uint8 [4, S, S] and captions; from memory after the first time, as far as `cache_decoded` allows."""
        if index in self._decoded:
            return self._decoded[index]
        sample = self.source[index]
        decoded = decode_rgba(sample.image, self.image, name=sample.name), sample.captions
        if (len(self._decoded) + 1) * decoded[0].numel() <= self.data.cache_decoded * MEBIBYTE:
            self._decoded[index] = decoded
        return decoded

    def _tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [B, T]; each caption is tokenised once per process."""
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._tokens))
        if new:
            limit = min(self.data.max_tokens, self.pad_to or self.data.max_tokens)
            encoded = self.tokenizer(new, truncation=True, max_length=limit)["input_ids"]
            self._tokens.update(zip(new, encoded, strict=True))
        rows = [self._tokens[caption] for caption in captions]
        width = self.pad_to or max(map(len, rows))
        padded = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        lengths = torch.tensor([[len(row)] for row in rows])
        return torch.tensor(padded), (torch.arange(width) < lengths).long()

    def _finish(self, rgba_B4HW: Tensor, seeds: list[int]) -> Tensor:
        changed = augment(rgba_B4HW, self.data.augment, seeds) if self.data.augment.active else rgba_B4HW
        under = random_backgrounds(seeds) if self.data.background == "random" else white(len(seeds))
        return compose(changed, under)


@dataclass(frozen=True, slots=True)
class PairLoader:
    """`for step, batch in PairLoader(dataset, rank=0, world_size=2).batches(start=10, stop=100)`."""

    dataset: PairDataset
    rank: int
    world_size: int

    def positions(self, step: int) -> list[int]:
        """This rank's positions of the stream at a step."""
        return positions_at(step, self.dataset.data.batch_size, self.rank, self.world_size)

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, LoadedBatch]]:
        """Steps start..stop-1 with this rank's rows."""
        steps = range(start, stop)
        batches = [self.positions(step) for step in steps]
        yield from zip(steps, loaded(self.dataset, batches, self.dataset.data.decode_workers), strict=True)
