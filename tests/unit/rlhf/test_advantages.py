"""Advantages against sums written out by hand, and what must not change them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fmray.rlhf.advantages import (
    gae,
    grpo_advantages,
    place_scores,
    reinforce_pp_advantages,
    rloo_advantages,
    whiten,
)

sizes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10_000))


def drawn(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values, and a right-padded mask with at least one token in each row."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=draw)
    rewards, values = torch.randn(2, rows, length, generator=draw, dtype=torch.float64)
    return rewards, values, torch.arange(length) < lengths


@settings(max_examples=40)
@given(sizes, st.floats(0, 1), st.floats(0, 1))
def test_6_14_gae_is_the_sum_over_the_future(size: tuple[int, int, int], gamma: float, lam: float) -> None:
    """A_t = Σ_k (γλ)^k (r_{t+k} + γ V_{t+k+1} − V_{t+k}), term by term in Python numbers."""
    rewards, values, mask = drawn(*size)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(size[0]):
        last = int(mask[row].sum())
        v = [*values[row, :last].tolist(), 0.0]
        for t in range(last):
            deltas = [float(rewards[row, k]) + gamma * v[k + 1] - v[k] for k in range(t, last)]
            expected = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-9)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-9)


def test_6_14_lambda_one_is_reward_to_go_and_lambda_zero_one_step() -> None:
    rewards, values, mask = drawn(4, 6, 1)
    kept = rewards.where(mask, 0)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = kept.flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns, to_go.where(mask, 0), atol=1e-12)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    ahead = torch.cat([values.where(mask, 0)[:, 1:], torch.zeros(4, 1)], dim=1)
    assert torch.allclose(advantages, (kept + 0.9 * ahead - values).where(mask, 0), atol=1e-12)


@settings(max_examples=40)
@given(sizes, st.integers(1, 6))
def test_6_15_masked_places_count_nothing_and_padding_changes_nothing(
    size: tuple[int, int, int], columns: int
) -> None:
    rewards, values, mask = drawn(*size)
    rubbish = torch.where(mask, 0.0, torch.nan)
    length, more = mask.shape[1], partial(F.pad, pad=(0, columns))
    for function in (
        lambda r, v, m: torch.stack(gae(r, v, m, 1.0, 0.95)),
        lambda r, v, m: whiten(r, m),
        lambda r, v, m: whiten(v, m, shift_mean=False, unbiased=False),
        lambda r, v, m: place_scores(r[:, 0], m, "last"),
        lambda r, v, m: reinforce_pp_advantages(r, m),
    ):
        plain = function(rewards, values, mask)
        assert (plain.masked_fill(mask, 0) == 0).all()
        assert torch.equal(plain, function(rewards + rubbish, values + rubbish, mask))
        padded = function(more(rewards, value=7.0), more(values, value=-3.0), more(mask))
        assert torch.allclose(
            padded[..., :length], plain, rtol=0, atol=1e-12
        )  # a longer sum may round otherwise
        assert (padded[..., length:] == 0).all()
    padded = gae(more(rewards, value=7.0), more(values, value=-3.0), more(mask), 1.0, 0.95)[0]
    assert torch.equal(padded[:, :length], gae(rewards, values, mask, 1.0, 0.95)[0]), "to the last bit"


def test_6_15_returns_are_of_advantages_before_whitening() -> None:
    rewards, values, mask = drawn(3, 5, 2)
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    assert torch.equal(returns, advantages + values.where(mask, 0))
    assert not torch.allclose(whiten(advantages, mask), advantages, atol=0.05)


@pytest.mark.parametrize("unbiased", [True, False])
def test_6_14_whitening_by_hand(unbiased: bool) -> None:
    values, _, mask = drawn(5, 8, 3)
    values = values * 3 + 40
    tokens = values[mask]
    expected = (tokens - tokens.mean()) / (tokens.var(correction=int(unbiased)) + 1e-8).sqrt()
    assert torch.allclose(whiten(values, mask, unbiased=unbiased)[mask], expected, atol=1e-10)
    kept = whiten(values, mask, unbiased=unbiased, shift_mean=False)[mask]
    assert torch.allclose(kept, expected + tokens.mean(), atol=1e-10)
    assert kept.mean().item() == pytest.approx(tokens.mean().item())


def test_6_14_whitening_keeps_its_digits_where_the_mean_is_large() -> None:
    values, _, mask = drawn(40, 30, 4)
    whitened = whiten((values + 1000).float(), mask)[mask]
    assert whitened.std().item() == pytest.approx(1, abs=1e-4)
    assert whitened.mean().item() == pytest.approx(0, abs=1e-4)


def test_one_token_and_equal_tokens_whiten_to_zero() -> None:
    assert whiten(torch.tensor([[5.0, 9.0]]), torch.tensor([[1, 0]])).tolist() == [[0.0, 0.0]]
    assert whiten(torch.full((2, 2), 3.0), torch.ones(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_scores_stand_at_the_last_token_or_one_behind_it() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    scores = torch.tensor([2.0, 3.0, 4.0, torch.nan])
    assert place_scores(scores, mask, "last").tolist() == [[0, 2, 0, 0], [0, 0, 0, 3], [4, 0, 0, 0], [0] * 4]
    assert place_scores(scores, mask, "after_last").tolist() == [
        [0, 0, 2, 0],
        [0, 0, 0, 3],  # no place behind it
        [0, 4, 0, 0],
        [0, 0, 0, 0],  # filler
    ]


# -------------------------------------------------------------------------------------------------------- without a critic


def test_grpo_and_rloo_by_hand() -> None:
    scores = torch.tensor([1.0, 5.0, 3.0, 2.0, 7.0], dtype=torch.float64)
    group = torch.tensor([9, 4, 9, 4, 9])
    nine, four = scores[group == 9], scores[group == 4]
    grpo = grpo_advantages(scores, group)
    assert torch.allclose(grpo[group == 9], (nine - nine.mean()) / (nine.std() + 1e-4), atol=1e-12)
    assert torch.allclose(grpo[group == 4], (four - four.mean()) / (four.std() + 1e-4), atol=1e-12)
    assert torch.allclose(grpo_advantages(scores, group, normalize_std=False)[group == 9], nine - nine.mean())
    expected = torch.tensor([1 - 5.0, 5 - 2.0, 3 - 4.0, 2 - 5.0, 7 - 2.0], dtype=torch.float64)
    assert torch.allclose(rloo_advantages(scores, group), expected, atol=1e-12)


@given(st.integers(2, 12), st.integers(0, 1000))
def test_grpo_and_rloo_follow_a_permutation_and_forget_a_constant(rows: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, generator=draw, dtype=torch.float64)
    group, order = torch.randint(0, 3, (rows,), generator=draw), torch.randperm(rows, generator=draw)
    for function in (grpo_advantages, rloo_advantages):
        plain = function(scores, group)
        assert torch.allclose(function(scores[order], group[order]), plain[order], atol=1e-12)
        assert torch.allclose(function(scores + 100.0, group), plain, atol=1e-9)
        for one in group.unique():
            assert plain[group == one].sum().item() == pytest.approx(0, abs=1e-9)


def test_a_sample_alone_and_equal_scores_have_no_advantage() -> None:
    group = torch.tensor([0, 1, 1])
    for function in (grpo_advantages, rloo_advantages):
        assert function(torch.tensor([3.0, 2.0, 2.0]), group).tolist() == [0, 0, 0]


def test_rloo_is_unbiased_grpo_points_the_same_way() -> None:
    """Leave-one-out is n/(n−1) times the centred score."""
    scores, group = (
        torch.randn(8, generator=torch.Generator().manual_seed(5)),
        torch.zeros(8, dtype=torch.int64),
    )
    centred = grpo_advantages(scores, group, normalize_std=False)
    assert torch.allclose(rloo_advantages(scores, group), centred * 8 / 7, atol=1e-6)


def test_reinforce_pp_is_whitened_reward_to_go() -> None:
    rewards, _, mask = drawn(4, 6, 6)
    kept = rewards.where(mask, 0)
    to_go = torch.zeros_like(kept)
    for t in range(6):
        to_go[:, t] = sum(0.9 ** (k - t) * kept[:, k] for k in range(t, 6))
    expected = whiten(to_go, mask)
    assert torch.allclose(reinforce_pp_advantages(rewards, mask, gamma=0.9), expected, atol=1e-12)
