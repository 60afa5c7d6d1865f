"""Noise by counter: even, independent, the same in any company; tokens by the inverse of the distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmray.models.decoding.sampling import CHUNK, most_likely_tokens, sample_tokens, uniforms

JUST_BELOW_ONE = 1 - 2.0**-53


def grid(seed: int, samples: int = 512, positions: int = 256) -> Tensor:
    return uniforms(seed, torch.arange(samples)[:, None], torch.arange(positions))


def chi_square(observed: Tensor, expected: Tensor) -> float:
    """Standard deviations that Pearson's statistic lies above its mean."""
    free = len(observed) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float((statistic - free) / (2 * free) ** 0.5)


def test_numbers_are_even_and_fill_the_unit_interval() -> None:
    u = grid(3).flatten()
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    assert abs(chi_square(counts, torch.full((64,), len(u) / 64))) < 4
    low_bits = (u * 2**53).long() & 255  # a weak mixer shows in the last bits
    assert abs(chi_square(low_bits.bincount(minlength=256).double(), torch.full((256,), len(u) / 256))) < 4


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (7, 16), (1, -1)])
def test_neighbours_in_sample_and_position_are_independent(shift: tuple[int, int]) -> None:
    u = grid(0)
    other = u.roll(shift, dims=(0, 1))
    correlation = torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]
    assert abs(correlation) < 4 / u.numel() ** 0.5
    cells = ((u * 8).long() * 8 + (other * 8).long()).flatten().bincount(minlength=64).double()
    assert abs(chi_square(cells, torch.full((64,), u.numel() / 64))) < 4


def test_seeds_are_independent_and_far_ids_are_no_twins() -> None:
    stacked = torch.stack([grid(seed, 64, 64).flatten() for seed in (0, 1, 2, -1, 2**64 - 2, 10**30)])
    off_diagonal = torch.corrcoef(stacked) - torch.eye(len(stacked))
    assert off_diagonal.abs().max() < 4 / stacked.shape[1] ** 0.5
    far = uniforms(0, torch.tensor([0, 1, 2**32, 2**62, -(2**63), 2**63 - 1])[:, None], torch.arange(64))
    assert len(far.unique()) == far.numel()


def test_a_number_depends_on_its_own_counter_alone() -> None:
    ids = torch.tensor([5, 900, 5, 17])
    whole = uniforms(7, ids[:, None], torch.arange(9))
    assert torch.equal(whole[0], whole[2])
    for row, sample in enumerate(ids):
        for position in range(9):
            assert uniforms(7, sample[None], position)[0] == whole[row, position]
    assert torch.equal(uniforms(7, ids.flip(0), 3), whole[:, 3].flip(0))
    assert torch.equal(uniforms(7 + 2**64, ids, 3), whole[:, 3])


def finaliser(word: int) -> int:
    """SplitMix64's, in whole numbers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


@pytest.mark.parametrize("seed", [0, 42, -3, 2**64 - 1])
def test_the_mixing_is_the_documented_one(seed: int) -> None:
    """A change of it changes every rollout of every seed."""
    for sample in (0, 1, 123456789, -1, 2**63 - 1):
        for position in (0, 1, 7, 100_000):
            word = finaliser(
                finaliser((seed + 0x9E3779B97F4A7C15) % 2**64) + sample * 0x9E3779B97F4A7C15 & 2**64 - 1
            )
            word = finaliser(word + position * 0xD1342543DE82EF95 & 2**64 - 1)
            assert uniforms(seed, torch.tensor([sample]), position).item() == (word >> 11) / 2**53


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.5])
@pytest.mark.parametrize("vocabulary", [7, CHUNK, 3 * CHUNK + 5])
def test_frequencies_follow_the_tempered_softmax(vocabulary: int, temperature: float) -> None:
    draw = torch.Generator().manual_seed(vocabulary)
    logits_V = torch.randn(vocabulary, generator=draw)
    count = 60_000
    ids, logp = sample_tokens(
        logits_V.expand(count, -1), uniforms(1, torch.arange(count), vocabulary), temperature
    )
    expected = (logits_V / temperature).softmax(-1)
    observed = ids.bincount(minlength=vocabulary).double()
    assert abs(chi_square(observed, expected.double() * count)) < 4
    torch.testing.assert_close(logp, expected.log()[ids], atol=1e-5, rtol=0)
    assert ids.dtype == torch.int64
    assert logp.dtype == torch.float32


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, JUST_BELOW_ONE])
def test_no_token_of_probability_zero(u: float) -> None:
    vocabulary = 5 * CHUNK + 3
    logits = torch.full((vocabulary,), -float("inf"))
    possible = torch.tensor([130, 131, 200, 3 * CHUNK - 1, 4 * CHUNK])
    for kept in (possible, possible[:1], possible[-1:], torch.arange(0)):
        row = logits.clone()
        row[kept] = torch.randn(len(kept))
        row[vocabulary - 1] = -200.0  # underflows to nothing where another token is possible
        ids, logp = sample_tokens(row[None], torch.tensor([u], dtype=torch.float64))
        assert int(ids) in (kept.tolist() or [vocabulary - 1])
        assert torch.isfinite(logp).all()


def test_ends_of_the_unit_interval_reach_the_first_and_the_last_token() -> None:
    logits = torch.randn(2, 1000)
    ids, _ = sample_tokens(logits, torch.tensor([0.0, JUST_BELOW_ONE], dtype=torch.float64))
    assert ids.tolist() == [0, 999]
    skewed = torch.cat([torch.full((1, 900), 5.0), torch.full((1, 100), -30.0)], dim=1)
    last, logp = sample_tokens(skewed, torch.tensor([JUST_BELOW_ONE], dtype=torch.float64))
    assert logp.exp() > 0
    assert int(last) >= 899


def test_every_token_is_found_where_the_cumulated_probability_says() -> None:
    """All boundaries of a distribution with exact sums: the middle of each token's interval gives that token."""
    vocabulary = 4 * CHUNK
    u = (torch.arange(vocabulary) + 0.5).double() / vocabulary
    ids, _ = sample_tokens(torch.zeros(vocabulary, vocabulary), u)
    assert ids.tolist() == list(range(vocabulary))


def test_likeliest_token_is_the_first_of_equals() -> None:
    ids, logp = most_likely_tokens(torch.tensor([[0.0, 3.0, 3.0, 1.0]]), temperature=2.0)
    assert ids.tolist() == [1]
    torch.testing.assert_close(logp, torch.tensor([0.0, 1.5, 1.5, 0.5]).log_softmax(-1)[1:2])


def test_broken_logits_show() -> None:
    _, logp = sample_tokens(
        torch.tensor([[0.0, float("nan"), 1.0]]), torch.tensor([0.5], dtype=torch.float64)
    )
    assert logp.isnan().all()
