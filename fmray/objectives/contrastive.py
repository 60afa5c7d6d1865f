"""Contrastive losses, exact at any world size; this file imports torch alone.

B rows of this rank  G rows of all ranks  D width of the shared space

Each rank scores its own B rows against all G (`local loss`), and gathers with gradient. The mean of the ranks' losses is
the loss of the whole batch, and the mean of their parameter gradients is its gradient, for any number of ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks in rank order; the gradient of a row is the sum of what all ranks found for it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        ctx.count = rows.shape[0]  # type: ignore[attr-defined]
        return _all_gather(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        count, rank = ctx.count, dist.get_rank()  # type: ignore[attr-defined]
        return total[rank * count : (rank + 1) * count]


def gather_rows(rows: Tensor) -> Tensor:
    """Every rank's rows, [G, …], differentiable; equal shapes on all ranks. One process: the rows themselves."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    if rows.requires_grad:
        return _GatherRows.apply(rows)  # type: ignore[no-any-return, no-untyped-call]
    return _all_gather(rows)


def _all_gather(rows: Tensor) -> Tensor:
    parts = [
        torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def row_keys(count: int, device: torch.device) -> Tensor:
    """Keys that make row i the positive of row i alone, int64 [B], distinct over all ranks."""
    ranks = dist.is_available() and dist.is_initialized()
    start = dist.get_rank() * count if ranks else 0
    return torch.arange(start, start + count, device=device)


def infonce(
    image_BD: Tensor, text_BD: Tensor, scale: Tensor, key_B: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Symmetric InfoNCE: (CE(images→texts) + CE(texts→images)) / 2, scalar.

    image_BD, text_BD: unit vectors. scale: exponentiated temperature, scalar. key_B: int64; rows with equal keys, on any
    rank, are positives of each other and share the target evenly. With distinct keys it is CLIP's loss
    (Radford et al. 2021, figure 3); with shared ones the supervised form "L_out" (Khosla et al. 2020, equation 2).
    """
    image_GD, text_GD = _gather_pair(image_BD, text_BD)
    target_BG = _targets(key_B, label_smoothing)
    to_text = _soft_cross_entropy(scale * image_BD @ text_GD.T, target_BG)
    to_image = _soft_cross_entropy(scale * text_BD @ image_GD.T, target_BG)
    return (to_text + to_image) / 2


def siglip(image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor, key_B: Tensor) -> Tensor:
    """Sigmoid loss, −(1/B) Σ_ij log σ(z_ij (scale·x_i·y_j + bias)), z = +1 for positives, −1 else; scalar.

    Zhai et al. 2023, algorithm 1. Shapes as for `infonce`; bias: scalar.
    """
    text_GD = gather_rows(text_BD)
    positive_BG = key_B.unsqueeze(1) == gather_rows(key_B).unsqueeze(0)
    logits_BG = scale * image_BD @ text_GD.T + bias
    return -F.logsigmoid(torch.where(positive_BG, logits_BG, -logits_BG)).sum() / len(key_B)


def in_batch_accuracy(image_BD: Tensor, text_BD: Tensor, key_B: Tensor) -> Tensor:
    """Share of this rank's images whose nearest text of this rank is a positive, scalar in 0..1."""
    nearest_B = (image_BD @ text_BD.T).argmax(dim=1)
    return (key_B[nearest_B] == key_B).float().mean()


def _gather_pair(image_BD: Tensor, text_BD: Tensor) -> tuple[Tensor, Tensor]:
    both = gather_rows(torch.cat([image_BD, text_BD], dim=1))  # one message instead of two
    width = image_BD.shape[1]
    return both[:, :width], both[:, width:]


def _targets(key_B: Tensor, label_smoothing: float) -> Tensor:
    """The distribution each row should predict: even over its positives, with a share spread over all."""
    positive_BG = (key_B.unsqueeze(1) == gather_rows(key_B).unsqueeze(0)).float()
    target_BG = positive_BG / positive_BG.sum(dim=1, keepdim=True)
    return target_BG * (1 - label_smoothing) + label_smoothing / target_BG.shape[1]


def _soft_cross_entropy(logits_BG: Tensor, target_BG: Tensor) -> Tensor:
    return -(target_BG * F.log_softmax(logits_BG, dim=1)).sum(dim=1).mean()
