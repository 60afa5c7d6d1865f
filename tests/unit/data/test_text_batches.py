"""Batches of like length: every row once in an epoch, the same on any number of ranks, little padding."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch

from fmray.data.text_batches import LengthBuckets, VerdictLoader, collate, right_padded, token_rows
from fmray.data.verdicts import Verdict

LENGTHS = [int(length) for length in np.random.default_rng(0).geometric(0.05, size=101)]


def buckets(batch_size: int = 6, window: int = 4, seed: int = 0) -> LengthBuckets:
    return LengthBuckets(LENGTHS, batch_size, window, seed)


def loader(rank: int, world: int, micro: int | None = None) -> VerdictLoader:
    verdicts = [Verdict(("x",), label=index) for index in range(len(LENGTHS))]
    rows = [([7] * length,) for length in LENGTHS]
    return VerdictLoader(verdicts, rows, buckets(), 0, 0.0, rank, world, micro)


def test_every_epoch_has_every_row_once() -> None:
    """404 positions of 101 rows in 24-row windows: windows straddle epochs, no row comes a third time before all came twice."""
    stream = [row for step in range(101 * 2 // 6) for row in buckets().rows(step)]
    counts = np.bincount(stream, minlength=101)
    assert counts.sum() == 198
    assert counts.max() <= 3
    window = sorted(chain.from_iterable(buckets(batch_size=101, window=2).rows(step) for step in (0, 1)))
    assert window == sorted([*range(101), *range(101)])


def test_a_step_is_a_function_of_seed_and_step_alone() -> None:
    forwards, other = buckets(), buckets()
    steps = [forwards.rows(step) for step in range(30)]
    assert [other.rows(step) for step in reversed(range(30))] == steps[::-1]
    assert [buckets(seed=1).rows(step) for step in range(30)] != steps


def test_batches_are_of_like_length_and_their_order_is_not() -> None:
    def padding(window: int) -> float:
        rows = [[LENGTHS[row] for row in buckets(window=window).rows(step)] for step in range(64)]
        return sum(max(batch) * len(batch) for batch in rows) / sum(map(sum, rows))

    assert padding(16) < 1.25 < 1.6 < padding(1)
    longest = [max(LENGTHS[row] for row in buckets(window=16).rows(step)) for step in range(16)]
    assert longest != sorted(longest)


def test_ranks_share_a_batch_evenly_whatever_their_number() -> None:
    for step in range(8):
        whole = loader(0, 1).batches(step)[0].label_B.tolist()
        assert whole == buckets().rows(step)
        for world in (2, 3):
            parts = [loader(rank, world).batches(step)[0].label_B.tolist() for rank in range(world)]
            assert sorted(chain.from_iterable(parts)) == sorted(whole)
            assert {len(part) for part in parts} == {6 // world}


def test_micro_batches_are_the_same_rows_padded_each_to_its_own() -> None:
    whole, parts = loader(0, 1).batches(3), loader(0, 1, micro=4).batches(3)
    assert [len(part) for part in parts] == [4, 2]
    assert torch.cat([part.label_B for part in parts]).tolist() == whole[0].label_B.tolist()
    assert parts[0].ids_NT.shape[1] <= parts[1].ids_NT.shape[1] == whole[0].ids_NT.shape[1]


def test_rows_of_several_texts_find_their_scores_again() -> None:
    verdicts = [Verdict(("a", "bb")), Verdict(("ccc", "d", "e"), margin=0.5)]
    rows = token_rows(verdicts, lambda texts: [[ord(letter) for letter in text] for text in texts])
    batch = collate(verdicts, rows, pad_id=0, margin=0.25)
    assert batch.ids_NT.tolist() == [[97, 0, 0], [98, 98, 0], [99, 99, 99], [100, 0, 0], [101, 0, 0]]
    assert batch.mask_NT.sum(1).tolist() == [1, 2, 3, 1, 1]
    assert batch.there_BK.tolist() == [[True, True, False], [True, True, True]]
    scores = batch.by_row(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert scores[batch.there_BK].tolist() == [0, 1, 2, 3, 4]
    assert batch.margin_B.tolist() == [0.25, 0.5]
    assert batch.label_B.tolist() == [-1, -1]


def test_right_padding() -> None:
    ids, mask = right_padded([[5], [6, 7, 8], []], pad_id=9)
    assert ids.tolist() == [[5, 9, 9], [6, 7, 8], [9, 9, 9]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
