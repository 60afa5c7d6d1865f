"""What PPO learns from: log-probabilities and the clipped losses. B rows  T response tokens  V vocabulary. Imports torch alone.

**Denominators.** Each loss is a sum over this micro-batch's tokens divided by `denominator`. For the mean over a whole
mini-batch, whatever its split, that is the mini-batch's number of tokens over all micro-batches *and* ranks, divided by the
number of ranks, because engines add the gradients of micro-batches and average those of ranks: `token_denominator(…)`.
`None` takes the micro-batch's own mean, which makes a result depend on the split (trl's way).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fmray.rlhf.sums import SumOverRanks, Sums, moments, one_rank, wide


@dataclass(frozen=True, slots=True)
class LossRules:
    """How the policy and the critic learn. The defaults are fmray's; `presets.compat_rules` has those of two trl versions."""

    clip: float = 0.2
    """The policy's ratio counts within 1 ± clip."""
    value_clip: float | None = 0.2
    """New values count within ± this of the old ones; None: anywhere."""
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    epochs: int = 4
    token_mean: Literal["mini_batch", "micro_batch"] = "mini_batch"
    """What a loss is the mean of: all tokens of the mini-batch, or each micro-batch's (denominator None)."""
    old_logp: Literal["learner", "rollout"] = "learner"
    """Whose log-probabilities are the old ones: the learner's own before the first step, or the sampler's."""
    importance_cap: float | None = 2.0
    """Largest importance weight; None: no weights."""
    ratio_threshold: float | None = None
    """A micro-batch whose mean ratio is above it is not learned from; None: all are."""
    temperature_offset: float = 0.0
    """Added to the sampling temperature where logits are divided by it."""


# ------------------------------------------------------------------------------------------------------- log-probabilities


class _TokenLogp(torch.autograd.Function):
    """log softmax at the chosen tokens, row by row: of size BTV there are the logits, and in time their gradient, no more."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, ids_BT: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits_BTV, ids_BT)
        ctx.temperature = temperature
        rows = [
            _scaled(logits_TV, temperature).log_softmax(dim=-1).gather(1, ids_T.unsqueeze(1)).squeeze(1)
            for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True)
        ]
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits_BTV, ids_BT = ctx.saved_tensors
        out_BTV = torch.empty_like(logits_BTV)
        for row, (logits_TV, ids_T) in enumerate(zip(logits_BTV, ids_BT, strict=True)):
            gradient_T1 = gradients[0][row].unsqueeze(1) / ctx.temperature
            row_TV = _scaled(logits_TV, ctx.temperature).softmax(dim=-1).mul_(-gradient_T1)
            out_BTV[row] = row_TV.scatter_add_(1, ids_T.unsqueeze(1), gradient_T1)
        return out_BTV, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return wide(logits) if temperature == 1.0 else wide(logits) / temperature


def token_logp(logits_BTV: Tensor, ids_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at ids, in nats, float32 [B, T] (float64 of float64).

    The logits of position t are those that token t was drawn from. Arithmetic in float32 whatever their precision. Beyond
    the logits it keeps [B, T] for the backward pass, and the gradient comes in the logits' own precision.
    """
    return _TokenLogp.apply(logits_BTV, ids_BT, temperature)  # type: ignore[no-any-return, no-untyped-call]


def token_entropy(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) at each position, in nats, float32 [B, T]; differentiable.

    A logit of −inf is a token that cannot be: it adds nothing.
    """
    rows = []
    for logits_TV in logits_BTV:
        logp_TV = _scaled(logits_TV, temperature).log_softmax(dim=-1)
        rows.append(-(logp_TV.exp() * logp_TV.clamp(min=torch.finfo(logp_TV.dtype).min)).sum(dim=-1))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------------------------ means


def token_denominator(mask_BT: Tensor, sum_over_ranks: SumOverRanks = one_rank, ranks: int = 1) -> Tensor:
    """The `denominator` of a mini-batch, float64 scalar: its true places over all ranks / ranks. A collective.

    mask_BT: of this rank's whole share of the mini-batch, all micro-batches of it; the policy's mask for the policy loss,
    the critic's for the value loss.
    """
    return sum_over_ranks(mask_BT.bool().sum(dtype=torch.float64)).clamp(min=1) / ranks


def token_mean(values_BT: Tensor, mask_BT: Tensor, denominator: Tensor | None = None) -> Tensor:
    """Σ values / denominator over the true places, scalar; for a KL or an entropy in the loss. See the head of this file."""
    mask_BT = mask_BT.bool()
    total = values_BT.masked_fill(~mask_BT, 0).sum()
    return total / (token_denominator(mask_BT) if denominator is None else denominator).to(total.dtype)


# ----------------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """`(a.sums + b.sums).over_ranks(…)` of all micro-batches, then `policy_metrics`."""

    loss: Tensor
    """Scalar, differentiable."""
    sums: Sums


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """`(a.sums + b.sums).over_ranks(…).means()`: `value_loss`, `value_clip_fraction`, `value_error` (mean squared)."""

    loss: Tensor
    """Scalar, differentiable; without the value coefficient."""
    sums: Sums


def policy_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip: float,
    denominator: Tensor | None = None,
    importance_BT: Tensor | None = None,
) -> PolicyLoss:
    """Σ max(−A ratio, −A clip(ratio, 1 ± clip)) / denominator with ratio = exp(logp − old_logp).

    Schulman et al. 2017, equation 7. logp_BT: with gradient. importance_BT: weights of each token's loss
    (`importance_weights`); None: all 1.
    """
    outside_BT = ~mask_BT.bool()
    log_ratio_BT = (wide(logp_BT) - wide(old_logp_BT)).masked_fill(outside_BT, 0)
    advantages_BT = wide(advantages_BT).masked_fill(outside_BT, 0)
    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip, 1 + clip)
    loss_BT = torch.maximum(plain_BT, clipped_BT)
    if importance_BT is not None:
        loss_BT = loss_BT * importance_BT.masked_fill(outside_BT, 0)
    sums = Sums.of(
        mask_BT,
        policy_loss=loss_BT,
        clip_fraction=clipped_BT > plain_BT,
        approx_kl=log_ratio_BT.square() / 2,
        ratio_excess=ratio_BT - 1,
        ratio_excess_square=(ratio_BT - 1).square(),
    )
    return PolicyLoss(token_mean(loss_BT, mask_BT, denominator), sums)


def policy_metrics(sums: Sums) -> dict[str, float]:
    """Token means: `policy_loss`, `clip_fraction`, `approx_kl` (½ (logp − old_logp)², nats), `ratio_mean`, `ratio_var`."""
    means = sums.means()
    excess, square = means.pop("ratio_excess"), means.pop("ratio_excess_square")
    return means | {"ratio_mean": 1 + excess, "ratio_var": square - excess**2}


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    clip: float | None,
    denominator: Tensor | None = None,
) -> ValueLoss:
    """½ Σ max((V − R)², (clip(V, V_old ± clip) − R)²) / denominator (Schulman's PPO code; Huang et al. 2022, detail 9).

    values_BT: with gradient. clip None: ½ Σ (V − R)² / denominator.
    """
    outside_BT = ~mask_BT.bool()
    values_BT, old_BT, returns_BT = (
        wide(x).masked_fill(outside_BT, 0) for x in (values_BT, old_values_BT, returns_BT)
    )
    plain_BT = (values_BT - returns_BT).square()
    clipped_BT = plain_BT
    if clip is not None:
        near_BT = torch.maximum(torch.minimum(values_BT, old_BT + clip), old_BT - clip)
        clipped_BT = (near_BT - returns_BT).square()
    loss_BT = torch.maximum(plain_BT, clipped_BT) / 2
    sums = Sums.of(
        mask_BT, value_loss=loss_BT, value_clip_fraction=clipped_BT > plain_BT, value_error=plain_BT
    )
    return ValueLoss(token_mean(loss_BT, mask_BT, denominator), sums)


def total_loss(policy: PolicyLoss, value: ValueLoss | None, rules: LossRules) -> Tensor:
    """policy + value_coefficient · value, scalar; times 0 beyond `rules.ratio_threshold`. value None: no critic."""
    total = policy.loss if value is None else policy.loss + rules.value_coefficient * value.loss
    if rules.ratio_threshold is None:
        return total
    return total * (policy_metrics(policy.sums)["ratio_mean"] <= rules.ratio_threshold)


# --------------------------------------------------------------------------------------------------- what else is measured


def importance_weights(old_logp_BT: Tensor, rollout_logp_BT: Tensor, cap: float) -> Tensor:
    """min(exp(old_logp − rollout_logp), cap), float32 [B, T], without gradient: truncated importance sampling.

    Corrects per token for samples that other weights or another arithmetic made than the learner's (Ionides 2008; Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    log_ratio_BT = wide(old_logp_BT.detach()) - wide(rollout_logp_BT.detach())
    return log_ratio_BT.exp().clamp(max=cap)


def mismatch_sums(
    old_logp_BT: Tensor, rollout_logp_BT: Tensor, mask_BT: Tensor, cap: float | None = None
) -> Sums:
    """Per token: `logp_difference` (|old − rollout|, nats), `importance` (weight), `importance_truncated` (share at the cap)."""
    weight_BT = importance_weights(old_logp_BT, rollout_logp_BT, float("inf"))
    limit = float("inf") if cap is None else cap
    return Sums.of(
        mask_BT,
        logp_difference=(wide(old_logp_BT) - wide(rollout_logp_BT)).abs(),
        importance=weight_BT.clamp(max=limit),
        importance_truncated=weight_BT > limit,
    )


def explained_variance(
    values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, sum_over_ranks: SumOverRanks = one_rank
) -> Tensor:
    """1 − Var(returns − values) / Var(returns) over the tokens of all ranks, float64 scalar; NaN where all returns are equal."""
    error = moments(wide(returns_BT) - wide(values_BT), mask_BT, sum_over_ranks)[2]
    spread = moments(returns_BT, mask_BT, sum_over_ranks)[2]
    return torch.where(spread > 0, 1 - error / spread, torch.nan)
