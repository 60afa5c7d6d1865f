"""Batches of dialogues as a function of (seed, step): groups, ranks, resume, sides, substitutes for what cannot be read."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from fmray.config.dialogues import DialogueDataConfig
from fmray.config.schema import AugmentConfig, ImageConfig
from fmray.data.dialogue_loader import (
    DialogueDataset,
    DialogueLoader,
    LoadedDialogues,
    decoded_pictures,
    group_dialogues,
)
from fmray.data.loader import epoch_order
from fmray.errors import DataError
from fmray.types import Dialogue, Pictures, Turn


def png(number: int) -> bytes:
    """Noise, so that any change of a picture shows, half of it transparent."""
    pixels_HW4 = np.random.default_rng(number).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels_HW4[:4, :, 3] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels_HW4).save(stream, "PNG")
    return stream.getvalue()


@dataclass
class Noise:
    """Picture i has i % 4 + 1 questions, asked in rounds; then pairs of pictures, and a text without one."""

    count: int = 12
    broken: frozenset[str] = frozenset()
    sided: frozenset[str] = frozenset()
    """Pictures whose last question speaks of sides."""
    reads: Counter[str] = field(default_factory=Counter)
    listed: list[Dialogue] = field(init=False)

    def __post_init__(self) -> None:
        rows = [((f"p{i}",), turn) for turn in range(4) for i in range(self.count) if turn <= i % 4] + [
            (("p0", "p1"), 0),
            (("p2", "p2"), 0),
            ((), 0),
            (("p0", "p1"), 1),
            ((), 1),
        ]
        self.listed = [
            Dialogue(
                f"{'+'.join(pictures)}?{turn}",
                pictures,
                (Turn(("", *("and",) * (len(pictures) - 1), f"number {turn}?") if pictures else ("say",), f"{turn}"),),
                sided=self.sided.issuperset(pictures) and bool(pictures) and turn == int(pictures[0][1:]) % 4,
            )
            for pictures, turn in rows
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> Dialogue:
        return self.listed[index]

    def picture(self, key: str) -> bytes:
        self.reads[key] += 1
        if key in self.broken:
            raise DataError(f"{key}: cannot be read")
        return png(int(key[1:]))


NOISY = {"augment": AugmentConfig(flip=0.5, rotate=20, color=0.3), "questions_per_picture": 2}
MIRRORED = AugmentConfig(flip=1.0, color=0.3)


def loader(
    rank: int = 0, world: int = 1, source: Noise | None = None, *, decode: bool = True, **data: object
) -> DialogueLoader:
    config = DialogueDataConfig.model_validate({"batch_size": 6, **data})
    dataset = DialogueDataset(source or Noise(), config, ImageConfig(size=8), seed=3, decode=decode)
    return DialogueLoader(dataset, rank, world)


def seen(parts: list[LoadedDialogues]) -> list[tuple[Dialogue, list[list[int]]]]:
    """Every dialogue in order, with the pixels of its pictures as numbers."""
    rows = []
    for part in parts:
        assert sum(part.groups) == len(part.dialogues)
        for dialogue in part.dialogues:
            pixels = part.pictures.pixels_NCHW
            found = [] if pixels is None else pixels[part.pictures.rows(dialogue.pictures)]
            rows.append((dialogue, [picture.flatten().tolist() for picture in found]))
    return rows


# -------------------------------------------------------------------------------------------------------------- groups


def test_a_group_is_what_is_asked_of_the_same_pictures() -> None:
    source = Noise(3)  # p0 1, p1 2, p2 3 questions, in rounds
    named = [[source[index].name for index in group] for group in group_dialogues(source)]
    assert named == [
        ["p0?0"], ["p1?0", "p1?1"], ["p2?0", "p2?1", "p2?2"],
        ["p0+p1?0", "p0+p1?1"], ["p2+p2?0"], ["?0"], ["?1"],
    ]  # fmt: skip
    assert group_dialogues(source, 7) == group_dialogues(source, 99) == group_dialogues(source)
    assert group_dialogues(source, 3) == [group_dialogues(source)[i] for i in (0, 2, 4)]
    assert len(loader(max_train_groups=5).dataset.groups) == 5


def test_an_epoch_shows_every_group_once_with_all_its_dialogues() -> None:
    source = Noise(12)  # 16 groups: two epochs are four steps of eight
    batches = loader(source=source, batch_size=8)
    order = [batches.dataset.groups[index] for epoch in (0, 1) for index in epoch_order(16, 3, epoch)]
    found = dict(batches.batches(0, 4))
    assert [batch.epoch for batch in found.values()] == [0, 0, 1, 1]
    dialogues = [dialogue.name for batch in found.values() for dialogue in batch.dialogues]
    assert dialogues == [source[index].name for group in order for index in group]
    assert [size for batch in found.values() for size in batch.groups] == [len(group) for group in order]


def test_questions_are_drawn_anew_each_epoch() -> None:
    batches = loader(questions_per_picture=2, batch_size=16)  # one epoch a step
    drawn: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for _, batch in batches.batches(0, 30):
        assert max(batch.groups) == 2
        start = 0
        for size in batch.groups:
            group = batch.dialogues[start : start + size]
            drawn.setdefault(group[0].pictures, []).append(tuple(d.name for d in group))
            start += size
    pairs = set(drawn[("p3",)])  # of four questions
    assert pairs == {(f"p3?{a}", f"p3?{b}") for a in range(4) for b in range(a + 1, 4)}
    assert set(drawn[("p0",)]) == {("p0?0",)}


# --------------------------------------------------------------------------------------------- a function of the position


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_process_sees(world: int) -> None:
    broken = Noise(broken=frozenset({"p1", "p5"}))
    whole = dict(loader(source=broken, **NOISY).batches(0, 8))
    ranks = [dict(loader(rank, world, broken, **NOISY).batches(0, 8)) for rank in range(world)]
    for step in range(8):  # 48 positions of 16 groups: over two epoch borders
        parts = [rank[step] for rank in ranks]
        assert seen([whole[step]]) == seen(parts)
        assert whole[step].groups == tuple(size for part in parts for size in part.groups)
        assert whole[step].bad == tuple(reason for part in parts for reason in part.bad)


def test_resume_at_any_step_on_another_number_of_workers() -> None:
    whole = dict(loader(**NOISY).batches(0, 8))
    for start in range(8):
        resumed = [dict(loader(rank, 3, **NOISY).batches(start, 8)) for rank in range(3)]
        for step in range(start, 8):
            assert seen([whole[step]]) == seen([rank[step] for rank in resumed])


@pytest.mark.slow
def test_decoding_processes_change_nothing() -> None:
    here, there = dict(loader(**NOISY).batches(2, 5)), dict(loader(decode_workers=2, **NOISY).batches(2, 5))
    for step in (2, 3, 4):
        assert seen([here[step]]) == seen([there[step]])


def test_another_seed_draws_another_way() -> None:
    one, other = loader(**NOISY), loader(**NOISY)
    other.dataset.seed = 4
    assert seen([next(one.batches(0, 1))[1]]) != seen([next(other.batches(0, 1))[1]])


@pytest.mark.parametrize("groups", [1, 2, 4, 6, 100])
def test_micro_batches_are_the_same_batch_in_pieces(groups: int) -> None:
    for _, batch in loader(source=Noise(broken=frozenset({"p1"})), **NOISY).batches(0, 8):
        parts = batch.micro_batches(groups)
        assert seen(parts) == seen([batch])
        assert tuple(size for part in parts for size in part.groups) == batch.groups
        assert all(len(part.groups) == groups for part in parts[:-1])
        assert tuple(reason for part in parts for reason in part.bad) == batch.bad
        for part in parts:
            named = {key for dialogue in part.dialogues for key in dialogue.pictures}
            assert set(part.pictures.keys) == named
            pixels = part.pictures.pixels_NCHW
            assert pixels is None if not named else pixels is not None and len(pixels) == len(named)


# ------------------------------------------------------------------------------------------------------------ pictures


def test_without_augmentation_a_picture_stands_in_a_batch_once_under_its_own_key() -> None:
    batches = loader(batch_size=32)  # two epochs in one batch
    _, batch = next(batches.batches(0, 1))
    assert sorted(batch.pictures.keys) == sorted(f"p{i}" for i in range(12))
    plain = decoded_pictures(Noise(), batch.pictures.keys, ImageConfig(size=8))
    assert batch.pictures.pixels_NCHW is not None
    assert plain.pixels_NCHW is not None
    assert torch.equal(batch.pictures.pixels_NCHW, plain.pixels_NCHW)


def test_augmented_a_picture_looks_another_way_at_each_position() -> None:
    _, batch = next(loader(batch_size=32, augment=MIRRORED).batches(0, 1))
    assert batch.pictures.pixels_NCHW is not None
    mine = [row for row, key in enumerate(batch.pictures.keys) if key.partition("@")[0] == "p3"]
    assert len(mine) == 2  # once in each epoch
    first, second = batch.pictures.pixels_NCHW[mine]
    assert not torch.equal(first, second)
    several = next(d for d in batch.dialogues if d.name == "p2+p2?0")
    assert len(set(several.pictures)) == 1  # the same picture twice in one question is one row


def pixels_by_key(batches: DialogueLoader) -> dict[str, torch.Tensor]:
    found = {}
    for _, batch in batches.batches(0, 4):
        assert batch.pictures.pixels_NCHW is not None
        found |= dict(zip(batch.pictures.keys, batch.pictures.pixels_NCHW, strict=True))
    return found


def test_a_picture_that_is_asked_about_sides_is_never_mirrored() -> None:
    sided = Noise(sided=frozenset({"p3", "p7", "p2"}))  # one of several questions is enough, drawn or not
    data = {"batch_size": 16, "questions_per_picture": 1}
    mixed = pixels_by_key(loader(source=sided, augment=MIRRORED, **data))
    never = pixels_by_key(loader(source=sided, augment=MIRRORED.model_copy(update={"flip": 0.0}), **data))
    always = pixels_by_key(loader(augment=MIRRORED, **data))
    assert mixed.keys() == never.keys() == always.keys()
    names = [key.partition("@")[0] for key in mixed]
    kept = {key for key in mixed if torch.equal(mixed[key], never[key])}
    assert {key.partition("@")[0] for key in kept} == {"p2", "p3", "p7"}
    assert sum(name in ("p3", "p7") for name in names) == sum(
        key.partition("@")[0] in ("p3", "p7") for key in kept
    )
    for key in mixed.keys() - kept:
        assert torch.equal(mixed[key], always[key])
        assert torch.equal(mixed[key], never[key].flip(2)), "flip=1 and flip=0 differ by the mirror alone"


def test_keys_alone_read_nothing() -> None:
    source = Noise(broken=frozenset({"p1"}))
    _, batch = next(loader(source=source, decode=False, batch_size=16).batches(0, 1))
    assert batch.pictures.pixels_NCHW is None
    assert set(batch.pictures.keys) == {f"p{i}" for i in range(12)}
    assert (batch.bad, not source.reads) == ((), True)
    assert [part.pictures.pixels_NCHW for part in batch.micro_batches(8)] == [None, None]


def test_memory() -> None:
    keeping, forgetting = Noise(), Noise()
    list(loader(source=keeping).batches(0, 8))
    list(loader(source=forgetting, cache_decoded=0).batches(0, 8))
    assert set(keeping.reads.values()) == {1}
    assert max(forgetting.reads.values()) == 6  # p0 and p1 are in two groups, three epochs


def test_texts_alone_make_a_batch() -> None:
    source = Noise(0)
    source.listed = [d for d in source.listed if not d.pictures]
    _, batch = next(loader(source=source, batch_size=2).batches(0, 1))
    assert batch.pictures == Pictures(())
    assert (batch.groups, len(batch.dialogues)) == ((1, 1), 2)


# --------------------------------------------------------------------------------------------------- what cannot be read


def test_an_unreadable_picture_is_named_and_its_group_replaced_by_its_position_alone() -> None:
    good, source = Noise(), Noise(broken=frozenset({"p1"}))
    whole, found = (loader(source=s, batch_size=16) for s in (good, source))
    (_, before), (_, after) = next(whole.batches(0, 1)), next(found.batches(0, 1))
    assert after.bad == ("p1: cannot be read",) * 2  # p1 alone, and with p0
    order, groups = epoch_order(16, 3, 0), whole.dataset.groups
    starts = np.cumsum([0, *after.groups])
    for place, index in enumerate(order):
        names = [source[i].name for i in groups[index]]
        taken = [d.name for d in after.dialogues[starts[place] : starts[place + 1]]]
        if "p1" not in good[groups[index][0]].pictures:
            assert taken == names
            continue
        attempts = [int(order[(place + 8 + further) % 16]) for further in range(1, 16)]
        stands_in = next(i for i in attempts if "p1" not in source[groups[i][0]].pictures)
        assert taken == [source[i].name for i in groups[stands_in]]
    assert len(before.groups) == len(after.groups) == 16


def test_nothing_readable_ends_in_one_line() -> None:
    source = Noise(4, broken=frozenset({"p0", "p1", "p2", "p3"}))
    source.listed = [d for d in source.listed if d.pictures]
    with pytest.raises(
        DataError, match=r"^no picture of the data set can be read; the first: p\d: cannot be read$"
    ):
        next(loader(source=source).batches(0, 1))


def test_decoded_pictures_for_evaluation() -> None:
    found = decoded_pictures(Noise(), ["p3", "p1", "p3"], ImageConfig(size=8))
    assert found.keys == ("p3", "p1")
    assert found.pixels_NCHW is not None
    rgba_HW4 = np.asarray(Image.open(io.BytesIO(png(1)))).astype(float)
    alpha_HW1 = rgba_HW4[..., 3:] / 255
    over_white_HWC = rgba_HW4[..., :3] * alpha_HW1 + 255 * (1 - alpha_HW1)
    expected_CHW = torch.from_numpy(over_white_HWC).permute(2, 0, 1)
    assert (found.pixels_NCHW[1].double() - expected_CHW).abs().max() <= 0.501
    assert decoded_pictures(Noise(), [], ImageConfig(size=8)) == Pictures(())
    with pytest.raises(DataError, match="p2: cannot be read"):
        decoded_pictures(Noise(broken=frozenset({"p2"})), ["p1", "p2"], ImageConfig(size=8))
    damaged = Noise()
    damaged.picture = lambda key: b"GIF87a"  # type: ignore[method-assign]
    with pytest.raises(DataError, match="p5: "):
        decoded_pictures(damaged, ["p5"], ImageConfig(size=8))
