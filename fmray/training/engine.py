"""Few verbs over a model and its optimizer: forward, backward, step; one plain torch engine, one DeepSpeed.

Both hold the same promises, tested against each other: gradients are the mean over ranks; `backward` may be called several times
before `step` (micro-batches, GradCache), the last call says so; `state` and `load_state` speak of whole fp32 tensors by
parameter name, so that a checkpoint of one engine, ZeRO stage or number of ranks opens in any other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmray.config.schema import EngineConfig, OptimizerConfig
from fmray.models.freezing import ParameterGroup

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running mean and running square, under torch's names."""


class Engine(Protocol):
    """What the loop and GradCache drive."""

    module: nn.Module

    def forward(self, **inputs: Any) -> Any:
        """The module's output, in the engine's precision; every learning parameter is read in here."""
        ...

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the loss's gradient; `last=False` where more calls follow before `step`."""
        ...

    def step(self, learning_rates: list[float]) -> float:
        """Average over ranks, clip, update each group at its rate, clear; returns the gradient's norm before clipping."""
        ...

    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """For each learning parameter, in order, its name and whole fp32 CPU tensors: weight and moments.

        A collective: every rank iterates to the end.
        """
        ...

    def load_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """The inverse of one item of `tensors`; a collective."""
        ...

    def load_step(self, step: int) -> None:
        """Tell the optimizer how many steps it has done (Adam's bias correction)."""
        ...

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
        """Inside, the parameters' data are whole on every rank (ZeRO-3 shards them otherwise); a collective."""
        ...


def make_adamw(groups: list[ParameterGroup], optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the groups; the same torch optimizer under both engines, so that their steps agree."""
    return torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in groups],
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,  # one pass over the memory: on a CPU 8 times as fast as the loop that is the default there
    )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 autocast, or nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


class TorchEngine:
    """A whole copy on every rank; gradients averaged in one flat message before the step."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[ParameterGroup],
        optimizer: OptimizerConfig,
        engine: EngineConfig,
        device: torch.device,
    ) -> None:
        self.module = module.to(device)
        self._device = device
        self._precision = engine.precision
        self._clip = optimizer.gradient_clipping
        self._optimizer = make_adamw(groups, optimizer)
        self._parameters = [p for group in groups for p in group.parameters]
        self._names = {parameter: name for name, parameter in module.named_parameters()}

    def forward(self, **inputs: Any) -> Any:
        with autocast(self._device, self._precision):
            return self.module(**inputs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # averaging waits for `step`, so `last` changes nothing here

    def step(self, learning_rates: list[float]) -> float:
        self._average_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm, foreach=True)
        for group, rate in zip(self._optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _average_gradients(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:  # a part that this batch did not touch still takes part in the average
                parameter.grad = torch.zeros_like(parameter)
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for parameter in self._parameters:
            state = self._optimizer.state.get(parameter, {})
            moments = {name: state[name] for name in MOMENTS if name in state}
            tensors = {"weight": parameter.data, **moments}
            yield self._names[parameter], {k: v.detach().float().cpu() for k, v in tensors.items()}

    def load_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        parameter = self.module.get_parameter(name)
        parameter.data.copy_(tensors["weight"])
        moments = {key: tensors[key].to(self._device) for key in MOMENTS if key in tensors}
        if moments:
            self._optimizer.state[parameter] = {"step": torch.zeros((), device=self._device), **moments}

    def load_step(self, step: int) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(step)

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


def make_engine(
    module: nn.Module,
    groups: list[ParameterGroup],
    optimizer: OptimizerConfig,
    engine: EngineConfig,
    device: torch.device,
    micro_batch: int,
) -> Engine:
    """The engine that the configuration names; DeepSpeed is imported only when asked for."""
    if engine.kind == "torch":
        return TorchEngine(module, groups, optimizer, engine, device)
    from fmray.training.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, groups, optimizer, engine, device, micro_batch)


def rates_at(groups: list[ParameterGroup], optimizer: OptimizerConfig, step: int, steps: int) -> list[float]:
    """Each group's learning rate at step `step` of 0..steps-1: a pure function, so a resume needs no scheduler state."""
    share = schedule_at(optimizer, step, steps)
    return [group.lr * share for group in groups]


def schedule_at(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then constant, linear, held or half a cosine down to `final_lr_share`."""
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps))
    if optimizer.schedule == "hold":  # warm up, stay, decay (Hu et al. 2024, MiniCPM, §4.2)
        progress = max(0.0, 3 * progress - 2)
    fall = (1 + math.cos(math.pi * progress)) / 2 if optimizer.schedule == "cosine" else 1 - progress
    return optimizer.final_lr_share + (1 - optimizer.final_lr_share) * fall
