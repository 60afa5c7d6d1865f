"""What each token was worth. B rows  T response tokens  G groups (prompts). This file imports torch alone.

A mask is bool or 0/1, [B, T], true at real tokens. What stands where it is false never counts, NaN too, and comes out as
exactly 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.rlhf.sums import SumOverRanks, moments, one_rank, wide

ScorePlace = Literal["last", "after_last"]


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, and returns = advantages + values, both [B, T].

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}, both beyond the last token 0 (Schulman et al. 2016, equations 11
    and 16). values_BT: V_t is what the critic expects *before* token t is chosen. Every row's tokens stand together, with
    padding behind them; more padding changes no bit.
    """
    outside_BT = ~mask_BT.bool()
    rewards_BT = wide(rewards_BT).masked_fill(outside_BT, 0)
    values_BT = wide(values_BT).masked_fill(outside_BT, 0)
    delta_BT = rewards_BT + gamma * F.pad(values_BT[:, 1:], (0, 1)) - values_BT
    advantage_B = torch.zeros_like(delta_BT[:, 0])
    backwards = []
    for delta_B in reversed(delta_BT.unbind(dim=1)):
        advantage_B = torch.add(delta_B, advantage_B, alpha=gamma * lam)
        backwards.append(advantage_B)
    advantages_BT = torch.stack(backwards[::-1], dim=1).masked_fill(outside_BT, 0)
    return advantages_BT, advantages_BT + values_BT


def whiten(
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    sum_over_ranks: SumOverRanks = one_rank,
    eps: float = 1e-8,
) -> Tensor:
    """(x − mean) / √(variance + eps) of the tokens of all ranks, [B, T]; the mean is put back where `shift_mean` is false.

    unbiased: Bessel's n/(n−1). A single token has no deviation and becomes 0.
    """
    count, mean, variance = moments(values_BT, mask_BT, sum_over_ranks)
    if unbiased:
        variance = variance * count / (count - 1).clamp(min=1)
    whitened_BT = (wide(values_BT) - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened_BT = whitened_BT + mean
    return whitened_BT.masked_fill(~mask_BT.bool(), 0)


def place_scores(scores_B: Tensor, mask_BT: Tensor, at: ScorePlace = "last") -> Tensor:
    """Per-token rewards [B, T] that are 0 but for each row's score, at its last token or one place behind it.

    `after_last`, where that place is beyond T, falls back to the last token: T then matters, as in trl 1.12. A row without
    tokens is filler and gets nothing.
    """
    length = mask_BT.shape[1]
    place_BT = torch.arange(length, device=mask_BT.device).expand_as(mask_BT)
    last_B = place_BT.masked_fill(~mask_BT.bool(), -1).amax(dim=1)
    at_B = last_B if at == "last" else (last_B + 1).clamp(max=length - 1)
    here_BT = (place_BT == at_B.unsqueeze(1)) & (last_B >= 0).unsqueeze(1)
    return torch.where(here_BT, wide(scores_B).unsqueeze(1), 0.0)


def grpo_advantages(scores_B: Tensor, group_B: Tensor, normalize_std: bool = True) -> Tensor:
    """(score − mean of its group) / (deviation of its group + 1e-4), [B]; one number for all tokens of the response.

    Shao et al. 2024 (DeepSeekMath), section 4.1.2, with trl's Bessel-corrected deviation; `normalize_std=False` is Dr. GRPO
    (Liu et al. 2025, arXiv 2503.20783). group_B: int64, equal for samples of one prompt; a group's samples are on one rank.
    A sample without another of its group has nothing to be compared with: 0.
    """
    mean_B, count_B, member_BG = _groups(wide(scores_B), group_B)
    centred_B = wide(scores_B) - mean_B
    if not normalize_std:
        return centred_B
    square_B = member_BG @ (member_BG.T @ centred_B.square())
    return centred_B / ((square_B / (count_B - 1).clamp(min=1)).sqrt() + 1e-4)


def rloo_advantages(scores_B: Tensor, group_B: Tensor) -> Tensor:
    """score − mean score of the others of its group, [B] (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, equation 7).

    group_B, and samples alone in their group: as for `grpo_advantages`.
    """
    mean_B, count_B, _ = _groups(wide(scores_B), group_B)
    return (wide(scores_B) - mean_B) * count_B / (count_B - 1).clamp(min=1)


def reinforce_pp_advantages(
    rewards_BT: Tensor,
    mask_BT: Tensor,
    gamma: float = 1.0,
    *,
    unbiased: bool = True,
    sum_over_ranks: SumOverRanks = one_rank,
) -> Tensor:
    """Rewards to go, Σ_{k≥t} γ^{k−t} r_k, whitened over the tokens of all ranks, [B, T] (Hu 2025, REINFORCE++, arXiv 2501.03262).

    rewards_BT: per token, the KL penalty in them.
    """
    to_go_BT, _ = gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, 1.0)
    return whiten(to_go_BT, mask_BT, unbiased=unbiased, sum_over_ranks=sum_over_ranks)


def _groups(scores_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's group mean and group size, [B], and who belongs where, [B, G]."""
    ids_G, index_B = group_B.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    member_BG = F.one_hot(index_B, len(ids_G)).to(scores_B.dtype)
    count_B = member_BG @ member_BG.sum(dim=0)
    return member_BG @ (member_BG.T @ scores_B) / count_B, count_B, member_BG
