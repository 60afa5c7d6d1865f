"""The DeepSpeed engine, ZeRO 0-3; the only file that imports deepspeed.

Tensors go in and out as whole fp32 tensors by parameter name, so checkpoints are free of stage and world size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from fmray.config.schema import EngineConfig, OptimizerConfig
from fmray.errors import MissingExtra
from fmray.models.freezing import ParameterGroup
from fmray.training.engine import MOMENTS, make_adamw


def deepspeed_settings(
    optimizer: OptimizerConfig, engine: EngineConfig, micro_batch: int, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration with every key that changes numbers written out, its surprising defaults included."""
    offload = {"device": "cpu", "pin_memory": device.type == "cuda"}
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": device.type == "cuda",
        "reduce_scatter": device.type
        == "cuda",  # gloo has none for every dtype; all-reduce gives the same sums
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if engine.offload != "none":
        zero["offload_optimizer"] = offload
    if engine.offload == "all":
        zero["offload_param"] = offload
    bf16 = engine.precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.gradient_clipping,  # left out, DeepSpeed clips at 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW on both engines: the same arithmetic
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        "communication_data_type": "fp32",
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """`Engine` over a DeepSpeed engine."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[ParameterGroup],
        optimizer: OptimizerConfig,
        engine: EngineConfig,
        device: torch.device,
        micro_batch: int,
    ) -> None:
        self._deepspeed = _import_deepspeed(device)
        self._stage = engine.zero_stage
        self._parameters = [p for group in groups for p in group.parameters]
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._by_name = {name: parameter for parameter, name in self._names.items()}
        for parameter in module.parameters():  # channels-last weights cannot be sent: it views them as bytes
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        # the weights are built and loaded whole before they are sharded: zero.Init leaves transformers' models badly initialised
        self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
            model=module.to(device),
            optimizer=make_adamw(groups, optimizer),
            config=deepspeed_settings(optimizer, engine, micro_batch, device),
        )
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        # without the boundary, ZeRO-1 and 2 reduce each call's gradient and silently add wrong sums
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rates: list[float]) -> float:
        for group, rate in zip(self._optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        norm: Any = None
        if self._stage == 0:  # DeepSpeed keeps no norm there unless it clips
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    # ------------------------------------------------------------------------------------------- whole tensors in and out

    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage > 0:
            self._make_state()
        for parameter in self._parameters:
            if self._stage == 0:
                state = self._optimizer.state.get(parameter, {})
                tensors = {"weight": parameter.data} | {k: state[k] for k in MOMENTS if k in state}
            else:
                tensors = {"weight": safe_get_full_fp32_param(parameter)}
                tensors |= {k: safe_get_full_optimizer_state(parameter, k) for k in MOMENTS}
            shape = getattr(parameter, "ds_shape", parameter.shape)
            yield (
                self._names[parameter],
                {k: v.detach().float().reshape(shape).cpu() for k, v in tensors.items()},
            )

    def load_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        parameter = self._by_name[name]
        with self.gathered([parameter], write=True):
            parameter.data.copy_(tensors["weight"])
        moments = {key: tensors[key] for key in MOMENTS if key in tensors}
        if self._stage == 0:
            device = parameter.device
            state = {key: value.to(device) for key, value in moments.items()}
            self._optimizer.state[parameter] = {"step": torch.zeros((), device=device), **state}
            return
        self._make_state()
        self._write(parameter, None, tensors["weight"])
        for key, value in moments.items():
            self._write(parameter, key, value)

    def _write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Put a whole tensor into this rank's share of the fp32 weights (key None) or of a moment."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._stage < 3:
            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
            return
        share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = value.flatten()
        padded = torch.nn.functional.pad(flat, (0, share * dist.get_world_size() - flat.numel()))
        mine = padded.narrow(0, share * dist.get_rank(), share)
        if key is None:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, key)

    def load_step(self, step: int) -> None:
        inner = self._optimizer if self._stage == 0 else self._optimizer.optimizer
        for state in inner.state.values():
            if "step" in state:
                state["step"].fill_(step)

    def _make_state(self) -> None:
        """AdamW makes its moments at the first step; saving and loading need them before."""
        zero = self._optimizer
        shares = (
            zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        )
        for share in shares:
            if "exp_avg" not in zero.optimizer.state[share]:
                moments = {key: torch.zeros_like(share) for key in MOMENTS}
                zero.optimizer.state[share] = {"step": torch.zeros((), device=share.device), **moments}
        if self._stage < 3:
            zero._hp_optimizer_states_linked = (
                False  # DeepSpeed links once, before the later groups have moments
            )
            zero._lazy_init_hp_params_optimizer_state()

    def gathered(
        self, parameters: list[nn.Parameter], *, write: bool = False
    ) -> AbstractContextManager[object]:
        if self._stage < 3:
            return nullcontext()
        rank: int | None = 0 if write else None
        gathered: AbstractContextManager[object] = self._deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=rank
        )
        return gathered


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told which accelerator to take, with its process group over ours."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_BUILD_OPS", "0")
    try:
        import deepspeed
    except ImportError:
        raise MissingExtra("deepspeed", "deepspeed", "engine.kind=deepspeed") from None
    # its shared-memory collectives are compiled at first use (a minute, a C++ compiler); gloo needs neither
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    os.environ.setdefault(
        "LOCAL_RANK", str(device.index or 0)
    )  # it insists on the variable, not on its meaning
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
