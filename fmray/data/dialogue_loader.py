"""Batches of dialogues as a pure function of (seed, step): so many groups, each a picture with what is asked of it.

A group is all dialogues with the same pictures; one without a picture is a group of its own. The stream of positions runs over
groups as `loader.py`'s does over pairs, so ranks, resume and substitutes for what cannot be read work alike, and every random
choice (which questions of a group, augmentation) is seeded by (seed, position).

N distinct pictures of a batch  C,H,W pixels  S side
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fmray.config.dialogues import DialogueDataConfig
from fmray.config.schema import ImageConfig
from fmray.data.dialogues import DialogueSource
from fmray.data.loader import MEBIBYTE, loaded, position_seed, positions_at, readable_at
from fmray.data.transforms import augment, compose, decode_rgba, white
from fmray.data.verdicts import spread
from fmray.types import Dialogue, Pictures

QUESTION_STREAM = 2 << 128
"""Philox counter of the draw of questions; the lower ones are augmentation's and background's (transforms.py)."""


def group_dialogues(source: DialogueSource, max_groups: int | None = None) -> list[tuple[int, ...]]:
    """Indices of the dialogues with the same pictures, in order of first appearance; at most so many, evenly spread."""
    groups: dict[tuple[str, ...] | int, list[int]] = {}
    for index in range(len(source)):
        groups.setdefault(source[index].pictures or index, []).append(index)
    return list(spread(tuple(map(tuple, groups.values())), max_groups))


def decoded_pictures(source: DialogueSource, keys: Sequence[str], image: ImageConfig) -> Pictures:
    """Pictures as they are, over white, each key once: uint8 [N, 3, S, S]; raises DataError that names what cannot be read."""
    distinct = tuple(dict.fromkeys(keys))
    rgba = [decode_rgba(source.picture(key), image, name=key) for key in distinct]
    return Pictures(distinct, compose(torch.stack(rgba), white(len(rgba))) if rgba else None)


@dataclass(frozen=True, slots=True)
class LoadedDialogues:
    """A rank's dialogues of one step, and what could not be read."""

    dialogues: tuple[Dialogue, ...]
    """Group after group."""
    groups: tuple[int, ...]
    """Dialogues of each group; they add up to all."""
    pictures: Pictures
    """The distinct pictures that the dialogues name; without pixels where nothing was decoded."""
    epoch: int
    """Epoch of the first group."""
    bad: tuple[str, ...]
    """Unreadable pictures of this rank's positions (name and reason); other groups took their places."""

    def micro_batches(self, groups: int) -> list[Self]:
        """The same dialogues, so many groups at a time, each part with its own pictures; the first carries `bad`."""
        ends = np.cumsum([0, *self.groups])
        parts = []
        for first in range(0, len(self.groups), groups):
            sizes = self.groups[first : first + groups]
            dialogues = self.dialogues[ends[first] : ends[first + len(sizes)]]
            bad = self.bad if first == 0 else ()
            parts.append(
                replace(self, dialogues=dialogues, groups=sizes, pictures=self._of(dialogues), bad=bad)
            )
        return parts

    def _of(self, dialogues: Sequence[Dialogue]) -> Pictures:
        keys = tuple(dict.fromkeys(key for dialogue in dialogues for key in dialogue.pictures))
        pixels_NCHW = self.pictures.pixels_NCHW
        return Pictures(
            keys, pixels_NCHW[self.pictures.rows(keys)] if pixels_NCHW is not None and keys else None
        )


@dataclass(frozen=True, slots=True)
class _Group:
    """All that is asked of a picture, and its decoded RGBA, uint8 [4, S, S] each."""

    dialogues: tuple[Dialogue, ...]
    rgba: tuple[Tensor, ...]

    @property
    def sided(self) -> bool:
        return any(dialogue.sided for dialogue in self.dialogues)


@dataclass
class DialogueDataset(Dataset[LoadedDialogues]):
    """Positions in, a finished batch out; lives in the learner's process or in each decoding process.

    Where pictures are augmented, a key in a batch is followed by its position (`12.png@4711`): a picture may stand at two
    positions of one batch, and looks another way at each.
    """

    source: DialogueSource
    data: DialogueDataConfig
    image: ImageConfig
    seed: int
    decode: bool = True
    """False: pictures carry their keys alone, and no file is read."""
    groups: list[tuple[int, ...]] = field(init=False)
    _decoded: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups = group_dialogues(self.source, self.data.max_train_groups)

    def __getitems__(self, positions: list[int]) -> LoadedDialogues:
        dialogues: list[Dialogue] = []
        sizes: list[int] = []
        bad: list[str] = []
        rows: dict[str, tuple[Tensor | None, int, bool]] = {}
        for position in positions:
            seed = position_seed(self.seed, position)
            group, reasons = readable_at(position, len(self.groups), self.seed, self._read)
            suffix = f"@{position}" if self.decode and self.data.augment.active else ""
            drawn = self._draw(group.dialogues, seed)
            for place, key in enumerate(dict.fromkeys(drawn[0].pictures)):
                rows[key + suffix] = (group.rgba[place] if self.decode else None, seed, group.sided)
            dialogues += [replace(d, pictures=tuple(key + suffix for key in d.pictures)) for d in drawn]
            sizes.append(len(drawn))
            bad += reasons
        epoch = positions[0] // len(self.groups)
        return LoadedDialogues(tuple(dialogues), tuple(sizes), self._finish(rows), epoch, tuple(bad))

    def _read(self, number: int) -> _Group:
        """A group with its distinct pictures, in order; raises DataError where one of them cannot be read."""
        dialogues = tuple(self.source[index] for index in self.groups[number])
        keys = dict.fromkeys(dialogues[0].pictures) if self.decode else ()
        return _Group(dialogues, tuple(map(self._decode, keys)))

    def _decode(self, key: str) -> Tensor:
        """uint8 [4, S, S]; from memory after the first time, as far as `cache_decoded` allows."""
        if key in self._decoded:
            return self._decoded[key]
        rgba_4HW = decode_rgba(self.source.picture(key), self.image, name=key)
        if (len(self._decoded) + 1) * rgba_4HW.numel() <= self.data.cache_decoded * MEBIBYTE:
            self._decoded[key] = rgba_4HW
        return rgba_4HW

    def _draw(self, dialogues: tuple[Dialogue, ...], seed: int) -> list[Dialogue]:
        """`questions_per_picture` of a group's dialogues, in their order; all where there are no more.

        Types take turns, so that a rare one is asked as often as a frequent one: among easy answers that nobody can guess wrong
        a picture's few telling questions would go under.
        """
        count = self.data.questions_per_picture or len(dialogues)
        if count >= len(dialogues):
            return list(dialogues)
        random = np.random.Generator(np.random.Philox(key=seed, counter=QUESTION_STREAM))
        turn_of: dict[str, int] = {}
        turns = []
        for index in random.permutation(len(dialogues)).tolist():
            kind = dialogues[index].kind
            turn_of[kind] = turn_of.get(kind, -1) + 1
            turns.append((turn_of[kind], index))
        first = sorted(turns, key=lambda turn: turn[0])[:count]  # stable: within a round as they were drawn
        return [dialogues[index] for index in sorted(index for _, index in first)]

    def _finish(self, rows: dict[str, tuple[Tensor | None, int, bool]]) -> Pictures:
        """Augmented pictures over white; one that a question speaks of sides of is never mirrored."""
        rgba = [picture for picture, _, _ in rows.values() if picture is not None]
        if not rgba:
            return Pictures(tuple(rows))
        rgba_N4HW = torch.stack(rgba)
        seeds = [seed for _, seed, _ in rows.values()]
        unmirrored = self.data.augment.model_copy(update={"flip": 0.0})
        for config, sided in ((self.data.augment, False), (unmirrored, True)):
            chosen = [row for row, (_, _, speaks) in enumerate(rows.values()) if speaks == sided]
            if config.active and chosen:
                rgba_N4HW[chosen] = augment(rgba_N4HW[chosen], config, [seeds[row] for row in chosen])
        return Pictures(tuple(rows), compose(rgba_N4HW, white(len(rows))))


@dataclass(frozen=True, slots=True)
class DialogueLoader:
    """`for step, batch in DialogueLoader(dataset, rank=0, world_size=2).batches(start=10, stop=100)`."""

    dataset: DialogueDataset
    rank: int
    world_size: int

    def positions(self, step: int) -> list[int]:
        """This rank's positions of the stream of groups at a step."""
        return positions_at(step, self.dataset.data.batch_size, self.rank, self.world_size)

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, LoadedDialogues]]:
        """Steps start..stop-1 with this rank's dialogues."""
        steps = range(start, stop)
        batches = [self.positions(step) for step in steps]
        yield from zip(steps, loaded(self.dataset, batches, self.dataset.data.decode_workers), strict=True)
