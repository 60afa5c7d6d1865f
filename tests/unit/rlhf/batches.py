"""A batch of responses with everything that credit and losses ask for, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Batch:
    """B responses of up to T tokens; every row of the same length as its mask says."""

    scores_B: Tensor
    ended_B: Tensor
    old_logp_BT: Tensor
    reference_logp_BT: Tensor
    values_BT: Tensor
    mask_BT: Tensor
    group_B: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        """In the order of `credit`."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def rows(self, rows: Tensor | slice) -> Self:
        """Some of the responses."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    def padded(self, columns: int) -> Self:
        """The same responses with more padding, full of rubbish."""
        longer = {
            name: F.pad(getattr(self, name), (0, columns), value=0 if name == "mask_BT" else 9.0)
            for name in self.__dataclass_fields__
            if name.endswith("_BT")
        }
        return replace(self, **longer)


def drawn_batch(rows: int, length: int, seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    """At least two tokens each; groups of about three."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=draw)
    logp, drift, values = torch.randn(3, rows, length, generator=draw, dtype=dtype)
    logp = -logp.abs() - 0.5
    return Batch(
        scores_B=torch.randn(rows, generator=draw, dtype=dtype),
        ended_B=torch.rand(rows, generator=draw) < 0.7,
        old_logp_BT=logp,
        reference_logp_BT=logp + 0.3 * drift,
        values_BT=values,
        mask_BT=torch.arange(length) < lengths,
        group_B=torch.arange(rows) // 3,
    )
