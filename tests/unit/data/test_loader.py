"""Batches as a function of (seed, step): ranks, resume, substitutes for what cannot be read."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image

from fmray.config.schema import AugmentConfig, DataConfig, ImageConfig
from fmray.data.loader import PairDataset, PairLoader, caption_key, epoch_order
from fmray.errors import DataError
from fmray.types import ImageText, ImageTextBatch


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(stream, "PNG")
    return stream.getvalue()


@dataclass
class Shades:
    """Sample i is a grey picture of shade i with two captions; some are broken."""

    count: int
    broken: frozenset[int] = frozenset()
    reads: Counter[int] = field(default_factory=Counter)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ImageText:
        self.reads[index] += 1
        image = b"not a picture" if index in self.broken else png(index)
        return ImageText(self.name(index), image, (f"shade {index}", f"grey {index}"))

    def name(self, index: int) -> str:
        return f"shade-{index}"


class WordTokenizer:
    """Real ids for the words above: one per character, so that lengths differ."""

    pad_token_id = 0

    def __call__(self, text: list[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in line][:max_length] for line in text]}


def loader(
    rank: int = 0, world: int = 1, *, broken: frozenset[int] = frozenset(), **data: object
) -> PairLoader:
    config = DataConfig.model_validate({"batch_size": 6, **data})
    dataset = PairDataset(Shades(20, broken), WordTokenizer(), config, ImageConfig(size=8), seed=3)
    return PairLoader(dataset, rank, world)


def join(parts: list[ImageTextBatch]) -> ImageTextBatch:
    return ImageTextBatch(
        torch.cat([p.pixels_BCHW for p in parts]),
        torch.cat([torch.nn.functional.pad(p.token_ids_BT, (0, 9 - p.token_ids_BT.shape[1])) for p in parts]),
        torch.cat([torch.nn.functional.pad(p.mask_BT, (0, 9 - p.mask_BT.shape[1])) for p in parts]),
        torch.cat([p.caption_key_B for p in parts]),
    )


def assert_same(a: ImageTextBatch, b: ImageTextBatch) -> None:
    for x, y in zip(
        (a.pixels_BCHW, a.token_ids_BT, a.mask_BT, a.caption_key_B),
        (b.pixels_BCHW, b.token_ids_BT, b.mask_BT, b.caption_key_B),
        strict=True,
    ):
        assert torch.equal(x, y)


NOISY = {"augment": AugmentConfig(flip=0.5, rotate=20, color=0.3), "background": "random"}


def test_every_epoch_holds_every_sample_once_in_another_order() -> None:
    epochs = [epoch_order(50, 1, epoch).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epoch_order(50, 2, 0).tolist() != epochs[0]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_process_sees(world: int) -> None:
    whole = dict(loader(**NOISY).batches(0, 8))
    ranks = [dict(loader(rank, world, **NOISY).batches(0, 8)) for rank in range(world)]
    for step in range(8):  # 48 positions of 20 samples: over two epoch borders
        assert_same(join([whole[step].rows]), join([rank[step].rows for rank in ranks]))


def test_resume_in_the_middle_of_an_epoch_on_another_number_of_workers() -> None:
    whole = dict(loader(**NOISY).batches(0, 8))
    resumed = [dict(loader(rank, 3, **NOISY).batches(5, 8)) for rank in range(3)]
    for step in (5, 6, 7):
        assert_same(join([whole[step].rows]), join([rank[step].rows for rank in resumed]))


@pytest.mark.slow
def test_decoding_processes_change_nothing() -> None:
    here, there = dict(loader(**NOISY).batches(2, 5)), dict(loader(decode_workers=2, **NOISY).batches(2, 5))
    for step in (2, 3, 4):
        assert_same(here[step].rows, there[step].rows)


def test_memory_and_truncation() -> None:
    keeping, forgetting = loader(), loader(cache_decoded=0)
    for batches in (keeping, forgetting):
        list(batches.batches(0, 20))
    assert max(keeping.dataset.source.reads.values()) == 1  # type: ignore[attr-defined]
    assert max(forgetting.dataset.source.reads.values()) == 6  # type: ignore[attr-defined]
    _, short = next(iter(loader(max_tokens=4).batches(0, 1)))
    assert short.rows.token_ids_BT.shape == (6, 4)


def test_an_unreadable_sample_is_named_and_replaced_alike_on_any_number_of_ranks() -> None:
    broken = frozenset({4, 11})
    whole = dict(loader(broken=broken).batches(0, 10))
    ranks = [dict(loader(rank, 2, broken=broken).batches(0, 10)) for rank in range(2)]
    for step in range(10):
        assert_same(join([whole[step].rows]), join([rank[step].rows for rank in ranks]))
    named = [reason.split(":")[0] for batch in whole.values() for reason in batch.bad]
    assert Counter(named) == {"shade-4": 3, "shade-11": 3}  # once in each of three epochs


def test_nothing_readable_stops() -> None:
    with pytest.raises(DataError, match="no picture of the data set can be read; the first: shade-"):
        next(loader(broken=frozenset(range(20))).batches(0, 1))


def test_caption_keys_agree_between_processes() -> None:
    assert caption_key("dog face") == 8884843023015612549
    assert caption_key("dog") != caption_key("dog face")
