"""The weights that are evaluated and saved: the learner's own, or their exponential moving average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fmray.runtime.context import Context
from fmray.training.engine import Engine


class WeightAverage:
    """EMA of the learning parameters: e ← d·e + (1 − d)·w after every step, in fp32.

    d rises with the steps t as min(decay, (1 + t) / (10 + t)), so that the start is forgotten. Each rank averages
    what it holds: whole parameters, or its shards under ZeRO-3.
    """

    def __init__(self, engine: Engine, decay: float, context: Context) -> None:
        self._decay = decay
        self._context = context
        self._parameters = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        self._average = {name: _held(p).detach().float().clone() for name, p in self._parameters.items()}

    def update(self, step: int) -> None:
        """After the optimizer's step number `step` (from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages = list(self._average.values())
        current = [_held(p).detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(averages, current, 1 - decay)

    def whole(self, name: str) -> Tensor:
        """The average of one parameter in its own shape, on the CPU; a collective under ZeRO-3."""
        parameter: Any = self._parameters[name]  # DeepSpeed hangs attributes on it
        held = self._average[name]
        if not hasattr(parameter, "ds_tensor"):
            return held.cpu()
        flat = self._context.gather(held.reshape(-1))
        whole: Tensor = flat[: parameter.ds_numel].view(parameter.ds_shape).cpu()
        return whole

    def load(self, name: str, value: Tensor) -> None:
        """Set one parameter's average from its whole tensor."""
        parameter, held = self._parameters[name], self._average[name]
        if not hasattr(parameter, "ds_tensor"):
            held.copy_(value)
            return
        share = held.numel()
        padded = nn.functional.pad(value.flatten(), (0, share * self._context.world_size - value.numel()))
        held.copy_(padded.narrow(0, share * self._context.rank, share).view_as(held))


def _held(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all of it, or ZeRO-3's shard."""
    shard = getattr(parameter, "ds_tensor", None)
    return parameter.data if shard is None else shard


def whole_weights(model: nn.Module, engine: Engine, average: WeightAverage | None) -> dict[str, Tensor]:
    """Copies of the weights to evaluate and save, buffers too, by name, whole and on the CPU; a collective."""
    weights: dict[str, Tensor] = {
        name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()
    }
    for name, parameter in model.named_parameters():
        if average is not None and parameter.requires_grad:
            weights[name] = average.whole(name).clone()
        else:
            with engine.gathered([parameter]):
                weights[name] = parameter.detach().cpu().clone()
    return weights
