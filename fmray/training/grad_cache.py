"""GradCache: the gradient of a loss over a whole batch with only a chunk's activations in memory (Gao et al. 2021).

1. Embed every chunk without a graph. 2. Compute the loss on all embeddings, and its gradient with respect to each.
3. Embed every chunk again, with a graph, and push its rows of that gradient through it.

Exact under every engine, the temperature's gradient included: only the last chunk's backward is announced as the last, so
ZeRO reduces once. The noise of a chunk (dropout) is the same in both passes because it is seeded by the chunk, not remembered.
The last chunk keeps its graph from the first pass: one forward less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmray.training.engine import Engine
from fmray.types import ImageTextBatch

Outputs = dict[str, Tensor]
"""Of a forward: tensors [B, …] and scalars, by name."""


@dataclass(frozen=True, slots=True)
class GradCache:
    """`GradCache(engine, loss, chunk=64, seed=…).backward(batch)` stands where `engine.backward(loss(…))` stood."""

    engine: Engine
    loss: Callable[[Outputs, ImageTextBatch], Tensor]
    chunk: int
    """Rows per forward."""

    def backward(self, batch: ImageTextBatch, noise_seed: int) -> tuple[Tensor, Outputs]:
        """Accumulate the loss's gradient; returns the loss, and the outputs for all rows (no graph)."""
        chunks = [slice(start, start + self.chunk) for start in range(0, len(batch), self.chunk)]
        with torch.no_grad():
            parts = [self._forward(batch, chunks, index, noise_seed) for index in range(len(chunks) - 1)]
        last = self._forward(batch, chunks, len(chunks) - 1, noise_seed)
        whole = _join([*parts, {name: value.detach() for name, value in last.items()}])
        loss = self.loss(whole, batch)
        gradients = dict(
            zip(whole, torch.autograd.grad(loss, list(whole.values()), allow_unused=True), strict=True)
        )
        order = [
            len(chunks) - 1,
            *range(len(chunks) - 1),
        ]  # the graph that is alive first, so that it is freed first
        for place, index in enumerate(order):
            outputs = last if place == 0 else self._forward(batch, chunks, index, noise_seed)
            surrogate = _surrogate(outputs, gradients, chunks[index], scalars=place == 0)
            self.engine.backward(surrogate, last=place == len(order) - 1)
            last = outputs = {}
        return loss.detach(), {name: value.detach() for name, value in whole.items()}

    def _forward(self, batch: ImageTextBatch, chunks: list[slice], index: int, noise_seed: int) -> Outputs:
        torch.manual_seed(noise_seed + index)
        return forward_outputs(self.engine, batch.rows(chunks[index]))


def forward_outputs(engine: Engine, batch: ImageTextBatch) -> Outputs:
    """The engine's forward on a batch, as named tensors."""
    outputs: Any = engine.forward(
        pixels_BCHW=batch.pixels_BCHW, token_ids_BT=batch.token_ids_BT, mask_BT=batch.mask_BT
    )
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def _join(parts: list[Outputs]) -> Outputs:
    """Chunks' outputs as the whole batch's leaves; scalars are every chunk's alike."""
    joined = {}
    for name, first in parts[0].items():
        value = first if first.dim() == 0 else torch.cat([part[name] for part in parts])
        joined[name] = value.detach().requires_grad_()
    return joined


def _surrogate(
    outputs: Outputs, gradients: Mapping[str, Tensor | None], rows: slice, *, scalars: bool
) -> Tensor:
    """A scalar whose gradient through this chunk is the whole loss's; scalars carry theirs in one chunk only."""
    total: Tensor | None = None
    for name, value in outputs.items():
        gradient = gradients[name]
        if gradient is None:
            term = 0.0 * value.sum()  # touched all the same: every rank's graph must reach every parameter
        elif value.dim() == 0:
            term = value * gradient if scalars else 0.0 * value
        else:
            term = (value * gradient[rows]).sum()
        total = term if total is None else total + term
    assert total is not None
    return total
