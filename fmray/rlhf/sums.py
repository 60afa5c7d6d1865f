"""Sums that add up over micro-batches and ranks, so that a mean over the whole batch is taken once, at its end.

B rows  T response tokens. This file imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]
"""A tensor in, the elementwise sum of all ranks' tensors out; every rank calls it equally often."""


def one_rank(tensor: Tensor) -> Tensor:
    """`SumOverRanks` of a single process: the tensor itself."""
    return tensor


def wide(values: Tensor) -> Tensor:
    """Half precisions as float32, others as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


@dataclass(frozen=True, slots=True)
class Sums:
    """Named sums over items (tokens or samples), and how many items they are of.

    `Sums.of(mask_BT, clip_fraction=clipped_BT, approx_kl=half_square_BT)` of each micro-batch; then
    `(first + second).over_ranks(all_reduce).means()` is `{"clip_fraction": 0.08, "approx_kl": 0.002}`.
    """

    names: tuple[str, ...]
    sums_N: Tensor
    """float64 [1 + names]: the number of items, then a sum for each name."""

    @classmethod
    def of(cls, mask: Tensor, **values: Tensor) -> Sums:
        """Of the items where `mask` holds; each value has the mask's shape. What is masked may be anything, NaN too."""
        mask = mask.bool()
        sums = [mask.sum(dtype=torch.float64)]
        sums += [v.detach().masked_fill(~mask, 0).sum(dtype=torch.float64) for v in values.values()]
        return cls(tuple(values), torch.stack(sums))

    def __add__(self, other: Sums) -> Sums:
        assert self.names == other.names, f"{self.names} and {other.names} are sums of different things"
        return Sums(self.names, self.sums_N + other.sums_N)

    def over_ranks(self, sum_over_ranks: SumOverRanks) -> Sums:
        """The sums of all ranks."""
        return Sums(self.names, sum_over_ranks(self.sums_N))

    def means(self) -> dict[str, float]:
        """Sum over number of items, by name; NaN where there are none."""
        return dict(zip(self.names, (self.sums_N[1:] / self.sums_N[0]).tolist(), strict=True))


def moments(
    values: Tensor, mask: Tensor, sum_over_ranks: SumOverRanks = one_rank
) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and biased variance of the values where `mask` holds, over all ranks; float64 scalars.

    In two passes, mean first: the variance keeps its digits where the mean is large. NaN where no value is.
    """
    mask = mask.bool()
    kept = wide(values).masked_fill(~mask, 0)
    count, total = sum_over_ranks(torch.stack([mask.sum(dtype=torch.float64), kept.sum(dtype=torch.float64)]))
    mean = total / count
    square = (kept - mean).masked_fill(~mask, 0).square().sum(dtype=torch.float64)
    return count, mean, sum_over_ranks(square) / count
