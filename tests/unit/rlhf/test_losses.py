"""The losses against hand calculation and numeric gradients, and what must not change them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmray.rlhf.credit import CreditRules, credit
from fmray.rlhf.losses import (
    LossRules,
    PolicyLoss,
    ValueLoss,
    explained_variance,
    importance_weights,
    mismatch_sums,
    policy_loss,
    policy_metrics,
    token_denominator,
    token_entropy,
    token_logp,
    token_mean,
    total_loss,
    value_loss,
)
from tests.unit.rlhf.batches import Batch, drawn_batch

# ------------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_6_8_tokens_are_scored_under_the_distribution_they_were_drawn_from(temperature: float) -> None:
    """Frequencies of 200 000 draws at a temperature are exp(token_logp) at that temperature, within sampling error."""
    logits = 1.5 * torch.randn(1, 1, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.multinomial(
        (logits[0, 0] / temperature).softmax(0), 200_000, True, generator=torch.Generator().manual_seed(1)
    )
    shares = torch.bincount(draws, minlength=9) / len(draws)
    p = token_logp(logits.expand(1, 9, 9), torch.arange(9).unsqueeze(0), temperature)[0].exp()
    assert p.sum().item() == pytest.approx(1)
    assert ((shares - p).abs() < 5 * (p * (1 - p) / len(draws)).sqrt()).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logp_and_its_gradient_are_those_of_log_softmax(temperature: float) -> None:
    draw = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(3, 5, 11, generator=draw, dtype=torch.float64)
    ids = torch.randint(0, 11, (3, 5), generator=draw)
    weights = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    mine = token_logp(found, ids, temperature)
    plain = (expected / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(mine, plain, atol=1e-12)
    (mine * weights).sum().backward()
    (plain * weights).sum().backward()
    assert found.grad is not None
    assert expected.grad is not None
    assert torch.allclose(found.grad, expected.grad, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: token_logp(x, ids, temperature), (logits.requires_grad_(),))


def test_token_logp_of_half_precision_is_computed_in_fp32_with_half_gradients() -> None:
    logits = torch.randn(2, 4, 5000, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
    ids = torch.zeros(2, 4, dtype=torch.int64)
    mine = token_logp(logits, ids)
    assert mine.dtype == torch.float32
    assert torch.allclose(mine, logits.detach().float().log_softmax(-1)[..., 0], atol=1e-6)
    mine.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_token_logp_keeps_no_second_vocabulary_for_the_backward_pass() -> None:
    logits = torch.randn(4, 8, 1000, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        token_logp(logits, torch.zeros(4, 8, dtype=torch.int64))
    others = [tensor for tensor in kept if tensor.data_ptr() != logits.data_ptr()]
    assert len(others) < len(kept)
    assert sum(tensor.numel() for tensor in others) <= 2 * 4 * 8


def test_entropy_by_hand_with_its_gradient_and_impossible_tokens() -> None:
    assert token_entropy(torch.zeros(2, 3, 8)).flatten().tolist() == pytest.approx([math.log(8)] * 6)
    logits = torch.tensor([[[1.0, -1e4, 0.5], [-math.inf, 2.0, 2.0]]], requires_grad=True)
    found = token_entropy(logits)
    p = 1 / (1 + math.exp(-0.5))
    assert found[0, 0].item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)
    assert found[0, 1].item() == pytest.approx(math.log(2), abs=1e-6)
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    smooth = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, 0.7), (smooth,))
    colder = token_entropy(smooth, 0.5)
    assert torch.allclose(colder, torch.distributions.Categorical(logits=smooth / 0.5).entropy())


# ----------------------------------------------------------------------------------------------------------------- losses


def learned(batch: Batch, seed: int = 0) -> dict[str, Tensor]:
    """A policy and a critic that have moved since the batch was made, and what they are to learn."""
    drift = torch.randn(
        2, *batch.mask_BT.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    given = credit(*batch.arguments(), CreditRules(), 0.1)
    assert given.returns_BT is not None
    return {
        "logp": batch.old_logp_BT + 0.4 * drift[0],
        "values": batch.values_BT + 0.4 * drift[1],
        "advantages": given.advantages_BT,
        "returns": given.returns_BT,
        "old_logp": batch.old_logp_BT,
        "old_values": batch.values_BT,
        "mask": batch.mask_BT,
    }


def losses(parts: dict[str, Tensor], denominator: Tensor | None = None) -> tuple[PolicyLoss, ValueLoss]:
    policy = policy_loss(
        parts["logp"], parts["old_logp"], parts["advantages"], parts["mask"], 0.2, denominator
    )
    value = value_loss(
        parts["values"], parts["old_values"], parts["returns"], parts["mask"], 0.2, denominator
    )
    return policy, value


def gradients(parts: dict[str, Tensor], denominator: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Total loss, and its gradients for the log-probabilities and values of these rows."""
    leaves = {name: parts[name].clone().requires_grad_() for name in ("logp", "values")}
    loss = total_loss(*losses(parts | leaves, denominator), LossRules())
    return loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))


def test_6_10_first_mini_batch_has_ratio_one_no_kl_and_nothing_clipped() -> None:
    batch = drawn_batch(6, 7, 0, torch.float32)
    parts = learned(batch) | {"logp": batch.old_logp_BT.clone().requires_grad_()}
    policy, _ = losses(parts)
    metrics = policy_metrics(policy.sums)
    assert metrics["ratio_mean"] == 1
    assert metrics["ratio_var"] == metrics["approx_kl"] == metrics["clip_fraction"] == 0
    (gradient,) = torch.autograd.grad(policy.loss, parts["logp"])
    expected = -parts["advantages"] / parts["mask"].sum()
    assert torch.allclose(gradient, expected.where(parts["mask"], 0), atol=1e-7), "the plain policy gradient"


@settings(max_examples=30)
@given(st.floats(-1.5, 1.5), st.floats(0.01, 3), st.sampled_from([-1, 1]), st.floats(0.05, 0.5))
def test_6_16_clipped_policy_loss_by_hand(log_ratio: float, size: float, sign: int, clip: float) -> None:
    advantage = sign * size
    logp = torch.tensor([[log_ratio - 2]], dtype=torch.float64, requires_grad=True)
    found = policy_loss(logp, torch.full_like(logp, -2), torch.tensor([[advantage]]), torch.ones(1, 1), clip)
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    assert found.loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-6)
    (gradient,) = torch.autograd.grad(found.loss, logp)
    stopped = (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip)
    assert gradient.item() == pytest.approx(0 if stopped else -advantage * ratio, abs=1e-6)
    assert found.sums.means()["clip_fraction"] == (1 if stopped else 0)


@settings(max_examples=30)
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_6_16_value_loss_is_half_the_larger_square(value: float, old: float, target: float) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    arguments = (torch.tensor([[old]]), torch.tensor([[target]]), torch.ones(1, 1))
    near = min(max(value, old - 0.2), old + 0.2)
    found = value_loss(values, *arguments, 0.2)
    assert found.loss.item() == pytest.approx(max((value - target) ** 2, (near - target) ** 2) / 2, abs=1e-6)
    unclipped = value_loss(values, *arguments, None)
    assert unclipped.loss.item() == pytest.approx((value - target) ** 2 / 2, abs=1e-6)
    (gradient,) = torch.autograd.grad(unclipped.loss, values)
    assert gradient.item() == pytest.approx(value - target, abs=1e-6)


def test_6_16_defaults_are_the_papers() -> None:
    rules = LossRules()
    assert (rules.clip, rules.value_clip, rules.value_coefficient, rules.epochs) == (0.2, 0.2, 0.1, 4)
    assert (rules.token_mean, rules.old_logp, rules.entropy_coefficient) == ("mini_batch", "learner", 0)


def test_losses_have_the_gradients_of_their_values() -> None:
    """Numeric differentiation, clipped and unclipped places alike."""
    parts = learned(drawn_batch(4, 5, 1))
    leaves = tuple(parts[name].clone().requires_grad_() for name in ("logp", "values"))
    assert torch.autograd.gradcheck(
        lambda logp, values: total_loss(*losses(parts | {"logp": logp, "values": values}), LossRules()),
        leaves,
    )


@settings(max_examples=25)
@given(st.integers(0, 999), st.lists(st.integers(1, 8), min_size=0, max_size=4), st.integers(0, 4))
def test_6_17_micro_batches_order_and_padding_change_nothing(
    seed: int, cuts: list[int], columns: int
) -> None:
    batch = drawn_batch(9, 6, seed)
    parts = learned(batch, seed)
    denominator = token_denominator(batch.mask_BT)
    whole, *grads = gradients(parts, denominator)
    whole_sums = [one.sums.means() for one in losses(parts, denominator)]
    rubbish = {
        n: torch.nn.functional.pad(x, (0, columns), value=0 if n == "mask" else 5) for n, x in parts.items()
    }
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    pieces = [piece for piece in torch.tensor_split(order, sorted(cuts)) if len(piece)]
    micros = [{n: x[rows] for n, x in rubbish.items()} for rows in pieces]
    total = sum(gradients(micro, denominator)[0] for micro in micros)
    assert torch.allclose(torch.as_tensor(total), whole, atol=1e-12)
    for k, whole_gradient in enumerate(grads, start=1):
        found = torch.cat([gradients(micro, denominator)[k] for micro in micros])[:, :6]
        assert torch.allclose(found, whole_gradient[order], atol=1e-12)
    for kind in (0, 1):
        first, *rest = [losses(micro, denominator)[kind].sums for micro in micros]
        assert sum(rest, start=first).means() == pytest.approx(whole_sums[kind], abs=1e-12)


def test_6_17_packing_changes_nothing() -> None:
    """All responses in one row, one behind the other, without padding."""
    parts = learned(drawn_batch(9, 6, 2))
    packed = {name: value[parts["mask"]].unsqueeze(0) for name, value in parts.items()}
    loss, *grads = gradients(parts)
    packed_loss, *packed_grads = gradients(packed)
    assert torch.allclose(packed_loss, loss, atol=1e-12)
    for found, whole in zip(packed_grads, grads, strict=True):
        assert torch.allclose(found[0], whole[parts["mask"]], atol=1e-12)


def test_the_means_of_micro_batches_do_depend_on_the_split() -> None:
    """What `denominator=None` is: trl's way, and what the test above would see."""
    parts = learned(drawn_batch(9, 6, 2))
    halves = [{n: x[rows] for n, x in parts.items()} for rows in (slice(0, 3), slice(3, 9))]
    total = sum(gradients(half)[0] for half in halves) / 2
    assert not torch.allclose(torch.as_tensor(total), gradients(parts)[0], atol=1e-3)


def test_masked_places_are_never_read() -> None:
    parts = learned(drawn_batch(5, 6, 3))
    rubbish = {n: x if n == "mask" else x.where(parts["mask"], torch.nan) for n, x in parts.items()}
    for found, expected in zip(gradients(rubbish), gradients(parts), strict=True):
        assert torch.equal(found, expected)
    empty = {**parts, "mask": torch.zeros_like(parts["mask"])}
    assert gradients(empty)[0] == 0


def test_kl_and_entropy_in_the_loss_share_the_denominator() -> None:
    batch = drawn_batch(6, 5, 4)
    per_token = torch.randn(6, 5, dtype=torch.float64).where(batch.mask_BT, torch.nan)
    denominator = token_denominator(batch.mask_BT)
    whole = token_mean(per_token, batch.mask_BT)
    assert whole.item() == pytest.approx(per_token[batch.mask_BT].mean().item())
    halves = [
        token_mean(per_token[rows], batch.mask_BT[rows], denominator) for rows in (slice(0, 1), slice(1, 6))
    ]
    assert torch.allclose(halves[0] + halves[1], whole)


def test_a_micro_batch_beyond_the_ratio_threshold_is_not_learned_from() -> None:
    parts = learned(drawn_batch(4, 5, 5))
    for shift, learns in ((0.0, True), (3.0, False)):
        moved = parts | {"logp": (parts["old_logp"] + shift).requires_grad_()}
        loss = total_loss(*losses(moved), LossRules(ratio_threshold=10.0))
        (gradient,) = torch.autograd.grad(loss, moved["logp"])
        assert bool(gradient.any()) == learns
        assert bool(loss != 0) == learns


# --------------------------------------------------------------------------------------------------- what else is measured


def test_importance_weights_are_truncated_and_scale_each_token() -> None:
    old, rollout = torch.tensor([[-1.0, -1.0, -2.0]]), torch.tensor([[-1.0, -3.0, -1.0]])
    weights = importance_weights(old.requires_grad_(), rollout, cap=2.0)
    assert not weights.requires_grad
    assert weights[0].tolist() == pytest.approx([1.0, 2.0, math.exp(-1)])
    logp, advantages = torch.tensor([[-1.1, -0.9, -2.2]]), torch.tensor([[1.0, -2.0, 0.5]])
    mask = torch.ones(1, 3)
    weighted = policy_loss(logp, old, advantages, mask, 0.2, importance_BT=weights).loss
    single = [
        policy_loss(logp[:, t : t + 1], old[:, t : t + 1], advantages[:, t : t + 1], mask[:, :1], 0.2).loss
        for t in range(3)
    ]
    expected = sum(float(w) * loss.item() for w, loss in zip(weights[0], single, strict=True)) / 3
    assert weighted.item() == pytest.approx(expected, rel=1e-6)


def test_mismatch_of_rollout_and_learner_is_measured_over_real_tokens() -> None:
    old, rollout = torch.tensor([[-1.0, -1.0, 5.0]]), torch.tensor([[-1.25, -3.0, 0.0]])
    means = mismatch_sums(old, rollout, torch.tensor([[1, 1, 0]]), cap=2.0).means()
    assert means == pytest.approx(
        {"logp_difference": 1.125, "importance": (math.exp(0.25) + 2) / 2, "importance_truncated": 0.5}
    )


def test_6_19_ratio_moments_and_explained_variance() -> None:
    parts = learned(drawn_batch(6, 7, 6))
    metrics = policy_metrics(losses(parts)[0].sums)
    mask = parts["mask"]
    ratio = (parts["logp"] - parts["old_logp"])[mask].exp()
    assert metrics["ratio_mean"] == pytest.approx(ratio.mean().item())
    assert metrics["ratio_var"] == pytest.approx(ratio.var(correction=0).item())
    assert metrics["approx_kl"] == pytest.approx(ratio.log().square().mean().item() / 2)
    returns, values = parts["returns"], parts["values"]
    expected = 1 - (returns - values)[mask].var() / returns[mask].var()
    assert explained_variance(values, returns, mask).item() == pytest.approx(expected.item())
    assert explained_variance(returns + 3, returns, mask).item() == pytest.approx(1)
    assert math.isnan(explained_variance(values, torch.ones_like(returns), mask).item())


def test_sums_of_different_things_do_not_add() -> None:
    policy, value = losses(learned(drawn_batch(3, 4, 7)))
    with pytest.raises(AssertionError, match="different things"):
        policy.sums + value.sums
    nothing: dict[str, Any] = losses(
        {name: value[:0] for name, value in learned(drawn_batch(3, 4, 7)).items()}
    )[0].sums.means()
    assert all(math.isnan(mean) for mean in nothing.values()), "no tokens have no mean"
