"""What a reward model learns from people's verdicts: labels, pairs, rankings; this file imports torch alone.

B rows of this rank  K answers of a row, from best to worst  P its pairs  C classes

Every loss is a mean over rows, so the mean of equally filled ranks' losses is that of the whole batch. A row with fewer than
K answers is marked in `mask_BK` (True where there is an answer, best first); what stands in the other places, NaN too, has no
influence and gets no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def classification(logits_BC: Tensor, label_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy −log softmax(logits)[label], mean over rows, scalar; label_B: int64 in 0..C-1."""
    return F.cross_entropy(logits_BC.float(), label_B, label_smoothing=label_smoothing)


def pairwise(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None) -> Tensor:
    """−log σ(r_chosen − r_rejected − margin), mean over rows, scalar.

    Bradley and Terry 1952 as in Ouyang et al. 2022, equation 1; the margin, in units of the score and 0 where it is not given,
    is Touvron et al. 2023 (Llama 2), equation 2.
    """
    ahead_B = chosen_B.float() - rejected_B.float()
    return -F.logsigmoid(ahead_B if margin_B is None else ahead_B - margin_B).mean()


def all_pairs(scores_BK: Tensor, mask_BK: Tensor | None = None, margin_B: Tensor | None = None) -> Tensor:
    """The pairwise loss over every two answers of a row, mean over its pairs, then over rows, scalar.

    Ouyang et al. 2022, equation 1: all C(K, 2) comparisons of one prompt are one element of the batch, so a prompt with many
    answers does not outweigh the others. K = 2 is `pairwise`. Every row needs at least two answers.
    """
    mask_BK = _all_there(scores_BK) if mask_BK is None else mask_BK
    safe_BK = scores_BK.float().masked_fill(~mask_BK, 0.0)
    better_P, worse_P = _pairs(scores_BK)
    ahead_BP = safe_BK[:, better_P] - safe_BK[:, worse_P]
    if margin_B is not None:
        ahead_BP = ahead_BP - margin_B.unsqueeze(1)
    there_BP = (mask_BK[:, better_P] & mask_BK[:, worse_P]).float()
    return -((F.logsigmoid(ahead_BP) * there_BP).sum(1) / there_BP.sum(1)).mean()


def plackett_luce(scores_BK: Tensor, mask_BK: Tensor | None = None) -> Tensor:
    """−log P(ranking), P = Π_i exp(r_i) / Σ_{j ≥ i} exp(r_j), mean over rows, scalar.

    Plackett 1975, Luce 1959: the best is drawn from all, the next from those left, and so on. K = 2 is `pairwise`.
    """
    mask_BK = _all_there(scores_BK) if mask_BK is None else mask_BK
    left_BK = scores_BK.float().masked_fill(~mask_BK, -torch.inf)
    # log Σ_{j ≥ i} exp(r_j), from the worst to the best
    rest_BK = left_BK.flip(1).logcumsumexp(1).flip(1)
    safe_BK = scores_BK.float().masked_fill(~mask_BK, 0.0)
    return (rest_BK.masked_fill(~mask_BK, 0.0) - safe_BK).sum(1).mean()


def pair_differences(scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """r_better − r_worse of every two answers of every row, float32 [pairs], rows one after the other."""
    better_P, worse_P = _pairs(scores_BK)
    there_BP = mask_BK[:, better_P] & mask_BK[:, worse_P]
    return (scores_BK.float()[:, better_P] - scores_BK.float()[:, worse_P])[there_BP]


def _pairs(scores_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the better and of the worse answer of every pair, int64 [P] each."""
    count = scores_BK.shape[1]
    better_P, worse_P = torch.triu_indices(count, count, offset=1, device=scores_BK.device)
    return better_P, worse_P


def _all_there(scores_BK: Tensor) -> Tensor:
    return torch.ones_like(scores_BK, dtype=torch.bool)
