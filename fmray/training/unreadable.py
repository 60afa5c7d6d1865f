"""Samples that could not be read: named, counted over all ranks, and too many of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fmray.errors import DataError
from fmray.runtime.context import Context

log = logging.getLogger(__name__)


@dataclass
class Unreadable:
    """The count of one epoch, which meets every sample once: so it is one of distinct samples on any number of ranks."""

    allowed: float
    """More than so many in an epoch stop the run."""
    _count: int = 0
    _epoch: int = 0
    _reasons: list[str] = field(default_factory=list)

    def count(self, reasons: Sequence[str], epoch: int, context: Context) -> int:
        """How many this epoch has had so far, these among them; a collective. Raises DataError where they are too many."""
        if epoch != self._epoch:
            self._count, self._epoch, self._reasons = 0, epoch, []
        new = context.sum(torch.tensor(float(len(reasons)), device=context.device)).item()
        self._count += round(new)
        for reason in reasons:
            log.warning("sample skipped: %s", reason)
        self._reasons += reasons
        if self._count > self.allowed:
            told = context.gather_texts("\n".join(self._reasons))
            names = [name for text in told for name in text.split("\n") if name]
            shown = "; ".join(names[:5]) + ("; …" if len(names) > 5 else "")
            raise DataError(
                f"{self._count} unreadable pictures, more than data.max_bad_share allows: {shown}"
            )
        return self._count
