"""From scores to advantages: the missing-EOS rule, the KL penalty, whitening, and who is masked where.

B rows  T response tokens. This file imports torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.rlhf.advantages import (
    ScorePlace,
    gae,
    grpo_advantages,
    place_scores,
    reinforce_pp_advantages,
    rloo_advantages,
    whiten,
)
from fmray.rlhf.kl import KlEstimator, kl_estimate
from fmray.rlhf.sums import SumOverRanks, Sums, one_rank, wide

AdvantageKind = Literal["gae", "grpo", "rloo", "reinforce++"]


@dataclass(frozen=True, slots=True)
class CreditRules:
    """How credit is given. The defaults are fmray's; `presets.compat_rules` has those of two trl versions."""

    advantage: AdvantageKind = "gae"
    gamma: float = 1.0
    """Discount, 0..1."""
    lam: float = 0.95
    """GAE's λ, 0..1."""
    kl: KlEstimator = "k1"
    kl_in: Literal["reward", "loss"] = "reward"
    """`reward`: each token's reward loses coefficient · KL. `loss`: it does not; the learner adds the KL to its loss."""
    kl_clamp: float | None = None
    """Largest absolute log-ratio to the reference that counts, in nats; None: no limit."""
    missing_eos: tuple[Literal["penalty", "replace"], float] | None = None
    """Of a response without EOS: ("penalty", x) takes x from its score, ("replace", x) makes x its score."""
    score_at: ScorePlace = "last"
    """The score is the reward of the last token, or of one place behind it."""
    value_mask: Literal["response", "plus_one"] = "response"
    """Where the critic is asked and learns: at the response's tokens, or at one place more."""
    skip_first_token: bool = False
    """Leave each response's first token out of everything, as trl 0.11 does with encoder-decoder policies."""
    whiten_rewards: bool = False
    """Deviation 1 of the per-token rewards; their mean stays."""
    whiten_advantages: bool | None = None
    """Mean 0, deviation 1 of the advantages; None: as the method has it (gae and reinforce++ yes, grpo and rloo no)."""
    whiten_scope: Literal["global", "rank"] = "global"
    """Moments over the tokens of all ranks, or of this one."""
    unbiased: bool = True
    """Variances with Bessel's correction."""
    group_std: bool = True
    """GRPO divides by the deviation of the group; False: Dr. GRPO."""

    def __post_init__(self) -> None:
        for name, value in (("gamma", self.gamma), ("lam", self.lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: must be in 0..1")
        if self.kl_clamp is not None and self.kl_clamp <= 0:
            raise ValueError(f"kl_clamp={self.kl_clamp}: must be above 0; None is no limit")
        if self.kl_in == "loss" and self.kl == "k1":
            raise ValueError("kl='k1' with kl_in='loss': its gradient is zero on average; use k2 or k3")
        if self.score_at == "after_last" and self.value_mask == "response":
            raise ValueError(
                "score_at='after_last' is outside value_mask='response'; use value_mask='plus_one'"
            )
        if self.value_mask == "plus_one" and self.advantage != "gae":
            raise ValueError(f"value_mask='plus_one': advantage={self.advantage!r} has no critic")
        if self.whiten_advantages is False and self.advantage == "reinforce++":
            raise ValueError("whiten_advantages=False: whitening is what reinforce++ is")

    @property
    def whitens_advantages(self) -> bool:
        """`whiten_advantages`, or what the method does by itself."""
        if self.whiten_advantages is None:
            return self.advantage in ("gae", "reinforce++")
        return self.whiten_advantages


@dataclass(frozen=True, slots=True)
class Credit:
    """What a batch of responses is worth, token by token; no gradient flows through it."""

    rewards_BT: Tensor
    """float32, the score at its place and, with `kl_in="reward"`, −coefficient · KL at every token; before whitening."""
    advantages_BT: Tensor
    """float32, whitened where the rules say so; 0 where the policy does not learn."""
    returns_BT: Tensor | None
    """float32, what the critic should have said: values + advantages before these are whitened. None without a critic."""
    kl_BT: Tensor
    """float32, the estimate in nats; 0 where the policy does not learn."""
    policy_mask_BT: Tensor
    """bool, the tokens that the policy learns from."""
    value_mask_BT: Tensor
    """bool, the places that the critic learns from."""
    scores_B: Tensor
    """float32, after the missing-EOS rule."""

    def sums(self) -> Sums:
        """Per response: `kl` (nats, summed over its tokens), `score`, `rlhf_reward` (score minus penalty) and `length`."""
        return Sums.of(
            self.policy_mask_BT.any(dim=1),
            kl=self.kl_BT.sum(dim=1),
            score=self.scores_B,
            rlhf_reward=self.rewards_BT.sum(dim=1),
            length=self.policy_mask_BT.sum(dim=1),
        )


@torch.no_grad()
def credit(
    scores_B: Tensor,
    ended_B: Tensor,
    old_logp_BT: Tensor,
    reference_logp_BT: Tensor,
    values_BT: Tensor | None,
    mask_BT: Tensor,
    group_B: Tensor,
    rules: CreditRules,
    kl_coefficient: float,
    sum_over_ranks: SumOverRanks = one_rank,
) -> Credit:
    """Credit for each token of this rank's responses; a collective where `rules` whiten over all ranks.

    scores_B: combined reward of each response. ended_B: bool, whether it ended with EOS. old_logp_BT, reference_logp_BT:
    log-probabilities, in nats, of the sampled tokens. values_BT: the critic's, V_t before token t; None for the kinds without
    one. mask_BT: true at the response's tokens, EOS among them, padding behind. group_B: int64, equal for samples of a
    prompt. A row without tokens is filler: it changes nothing. Raises ValueError for a mask with holes or missing values.
    """
    policy_mask_BT, value_mask_BT = masks(mask_BT, rules)
    scores_B = after_eos_rule(wide(scores_B), ended_B.bool(), rules)
    kl_BT = kl_estimate(old_logp_BT, reference_logp_BT, rules.kl, rules.kl_clamp)
    kl_BT = kl_BT.masked_fill(~policy_mask_BT, 0)
    rewards_BT = place_scores(scores_B, policy_mask_BT, rules.score_at)
    if rules.kl_in == "reward":
        rewards_BT = rewards_BT - kl_coefficient * kl_BT
    everyone = sum_over_ranks if rules.whiten_scope == "global" else one_rank
    seen_BT = rewards_BT
    if rules.whiten_rewards:
        seen_BT = whiten(
            rewards_BT, value_mask_BT, shift_mean=False, unbiased=rules.unbiased, sum_over_ranks=everyone
        )
    returns_BT = None
    if rules.advantage == "gae":
        if values_BT is None:
            raise ValueError("values_BT=None: advantage='gae' needs a critic's values")
        advantages_BT, returns_BT = gae(seen_BT, values_BT, value_mask_BT, rules.gamma, rules.lam)
    elif rules.advantage == "reinforce++":
        advantages_BT = reinforce_pp_advantages(
            seen_BT, policy_mask_BT, rules.gamma, unbiased=rules.unbiased, sum_over_ranks=everyone
        )
    else:
        advantages_BT = _compared(seen_BT, policy_mask_BT, group_B, rules)
    if rules.whitens_advantages and rules.advantage != "reinforce++":
        advantages_BT = whiten(
            advantages_BT, policy_mask_BT, unbiased=rules.unbiased, sum_over_ranks=everyone
        )
    advantages_BT = advantages_BT.masked_fill(~policy_mask_BT, 0)
    return Credit(rewards_BT, advantages_BT, returns_BT, kl_BT, policy_mask_BT, value_mask_BT, scores_B)


def masks(mask_BT: Tensor, rules: CreditRules) -> tuple[Tensor, Tensor]:
    """Where the policy learns and where the critic does, bool [B, T] each."""
    mask_BT = mask_BT.bool()
    if bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()):
        raise ValueError(
            "mask_BT: a response's tokens must start at place 0 and stand together, padding behind them"
        )
    if rules.skip_first_token:
        if bool((mask_BT.sum(dim=1) == 1).any()):
            raise ValueError(
                "skip_first_token: a response of one token has nothing left; trl 0.11 fails there too"
            )
        mask_BT = mask_BT & (torch.arange(mask_BT.shape[1], device=mask_BT.device) > 0)
    if rules.value_mask == "response":
        return mask_BT, mask_BT
    return mask_BT, mask_BT | F.pad(mask_BT[:, :-1], (1, 0))


def after_eos_rule(scores_B: Tensor, ended_B: Tensor, rules: CreditRules) -> Tensor:
    """The scores [B] after the rule for responses that ran into the length limit (Huang et al. 2024, "the EOS trick")."""
    if rules.missing_eos is None:
        return scores_B
    kind, amount = rules.missing_eos
    cut_B = scores_B - amount if kind == "penalty" else torch.full_like(scores_B, amount)
    return torch.where(ended_B, scores_B, cut_B)


def _compared(rewards_BT: Tensor, mask_BT: Tensor, group_B: Tensor, rules: CreditRules) -> Tensor:
    """GRPO's or RLOO's number for each response, from its whole reward, at all of its tokens."""
    real_B = mask_BT.any(dim=1)
    whole_B = rewards_BT.sum(dim=1)
    advantages_B = torch.zeros_like(whole_B)
    if rules.advantage == "grpo":
        advantages_B[real_B] = grpo_advantages(whole_B[real_B], group_B[real_B], rules.group_std)
    else:
        advantages_B[real_B] = rloo_advantages(whole_B[real_B], group_B[real_B])
    return advantages_B.unsqueeze(1) * mask_BT
