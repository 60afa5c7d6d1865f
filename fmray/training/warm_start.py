"""Where a picture's projection should start: at the ridge regression from features to captions' embeddings.

N samples of all ranks  F width of the vision tower  D width of the shared space
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fmray.data.loader import PairDataset
from fmray.evaluation.embed import embed_texts, measuring
from fmray.models.clip import DualEncoder
from fmray.models.saved import LoadedDualEncoder
from fmray.runtime.context import Context
from fmray.training.engine import autocast

ROWS = 64


def start_at_ridge(
    model: DualEncoder,
    tokenizer: PreTrainedTokenizerFast,
    dataset: PairDataset,
    strength: float,
    precision: str,
    context: Context,
) -> None:
    """Set weight and bias of `model.vision_projection` to min ‖(x − μ)W − (y − ν)‖² + λ‖W‖², λ = strength·N·mean variance.

    x: features [N, F] of the training pictures, unchanged over white; y: means [N, D] of their captions' unit vectors, for in
    training each caption is as likely as another. Closed form (Hoerl and Kennard 1970): W = (XᵀX + λI)⁻¹XᵀY of centred X and Y.
    Each rank adds up its share of the sums in float64.
    """
    projection = model.vision_projection
    assert isinstance(projection, nn.Linear)
    encoder = LoadedDualEncoder(model, tokenizer, model.image, model.config.max_tokens)
    device = model.device
    width, dims = projection.in_features, projection.out_features
    sums = torch.zeros(width + 1, width + 1 + dims, dtype=torch.float64, device=device)
    indices = range(context.rank, len(dataset.source), context.world_size)
    with measuring(model):
        for start in range(0, len(indices), ROWS):
            pixels, captions = dataset.plain_rows(list(indices[start : start + ROWS]))
            if not captions:
                continue
            with autocast(
                device, precision
            ):  # as in training: half the time, and the features that will be seen there
                x_NF = model.image_features(pixels.to(device)).double()
            flat = [caption for choices in captions for caption in choices]
            by_picture = torch.split(embed_texts(encoder, flat).double(), list(map(len, captions)))
            y_ND = torch.stack([vectors.mean(0) for vectors in by_picture])
            one_x = torch.cat([torch.ones_like(x_NF[:, :1]), x_NF], dim=1)
            sums += one_x.T @ torch.cat([one_x, y_ND], dim=1)
        weight_FD, bias_D = solve_ridge(context.sum(sums), width, strength)
        projection.weight.copy_(weight_FD.T)
        projection.bias.copy_(bias_D)


def solve_ridge(sums: Tensor, width: int, strength: float) -> tuple[Tensor, Tensor]:
    """Weight [F, D] and bias [D] from Σ [1 x]ᵀ[1 x y], float64 [1 + F, 1 + F + D]."""
    count = sums[0, 0]
    mean_F, mean_D = sums[0, 1 : width + 1] / count, sums[0, width + 1 :] / count
    covariance = sums[1:, 1 : width + 1] - count * torch.outer(mean_F, mean_F)
    cross = sums[1:, width + 1 :] - count * torch.outer(mean_F, mean_D)
    penalty = strength * covariance.trace() / width  # strength · N · the mean variance of a feature
    identity = torch.eye(width, dtype=sums.dtype, device=sums.device)
    weight_FD = torch.linalg.solve(covariance + penalty * identity, cross)
    return weight_FD, mean_D - mean_F @ weight_FD
