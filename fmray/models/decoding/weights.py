"""What a layer multiplies with, LoRA included, and matrices laid out for skinny products.

On a CPU, oneDNN's packed layout does a 32-row fp32 product two to three times as fast as `F.linear` where MKL does not
favour the processor (AMD EPYC, torch 2.13), and bf16 half as long again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from fmray.errors import ConfigError

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKED_FOR_ROWS = 32  # the layout it gives is as good for 1 and for 1,024 rows


def base_model(model: Any) -> Any:
    """The transformers model inside a peft wrapper, its adapters in place; the model itself where there is none."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type
        raise ConfigError("adapter", str(kind), "decoding takes adapters that change weights, such as LoRA")
    return model.get_base_model()


def effective_weight(layer: Any) -> Tensor:
    """W of y = x Wᵀ, or the table of an embedding, float32 [N, K], with every active LoRA adapter added.

    Raises ConfigError for adapters that are more than a sum (DoRA, LoRA on a bias, IA3): merge those first.
    """
    layer = _unwrapped(layer)
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight = base.weight.detach()
    if not weight.dtype.is_floating_point:
        raise ConfigError(
            "policy weights", str(weight.dtype), "decoding needs floating-point weights; dequantise them"
        )
    weight = weight.float()
    if base is not layer:
        for delta in _deltas(layer):
            weight = weight + delta.float()
    weight_NK: Tensor = weight.t() if isinstance(base, Conv1D) else weight
    return weight_NK


def effective_bias(layer: Any) -> Tensor | None:
    """b of y = x Wᵀ + b, float32 [N]."""
    layer = _unwrapped(layer)
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return None if getattr(base, "bias", None) is None else base.bias.detach().float()


def _unwrapped(layer: Any) -> Any:
    """peft keeps a trained copy of a whole layer (`modules_to_save`) beside the original."""
    if not hasattr(layer, "modules_to_save"):
        return layer
    names = [name for name in layer.active_adapters if name in layer.modules_to_save]
    return layer.modules_to_save[names[0]] if names and not layer.disable_adapters else layer.original_module


def _deltas(layer: Any) -> list[Tensor]:
    if layer.disable_adapters or layer.merged:
        return []
    variants = getattr(layer, "lora_variant", {})
    biased = getattr(layer, "lora_bias", {})
    if not hasattr(layer, "get_delta_weight") or any(
        name in variants or biased.get(name) for name in layer.active_adapters
    ):
        cure = "only plain LoRA can be added to the weights; merge the adapter (merge_and_unload) or use AnyDecoder"
        raise ConfigError("adapter", type(layer).__name__, cure)
    held = {name for part in layer.adapter_layer_names for name in getattr(layer, part, {})}
    return [layer.get_delta_weight(name).detach() for name in layer.active_adapters if name in held]


class Matrix:
    """y = x Wᵀ + b of one or several layers that read the same x, stacked along their outputs, as they are now.

    gain_K: factors on the inputs (a norm's weight). scaled: (n, factor) multiplies the first n outputs, bias too (the
    queries by what the attention scales its scores with). replaced: (n, layer) puts the layer's one output in the place of
    output n. A change of the layers asks for a new Matrix.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        precision: Precision,
        *,
        gain_K: Tensor | None = None,
        scaled: tuple[int, float] | None = None,
        replaced: tuple[int, Any] | None = None,
    ) -> None:
        weights = [effective_weight(layer) for layer in layers]
        biases = [effective_bias(layer) for layer in layers]
        weight_NK = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias_N = torch.cat(
            [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        )
        if replaced is not None:
            place, layer = replaced
            weight_NK, biases = weight_NK.clone(), [*biases, effective_bias(layer)]
            weight_NK[place] = effective_weight(layer)[0]
            bias_N[place] = 0.0 if biases[-1] is None else biases[-1][0]
        if gain_K is not None:
            weight_NK = weight_NK * gain_K
        if scaled is not None:
            factor_N = torch.ones_like(bias_N)
            factor_N[: scaled[0]] = scaled[1]
            weight_NK, bias_N = weight_NK * factor_N[:, None], bias_N * factor_N
        self._dtype = DTYPES[precision]
        self._bias = None if all(bias is None for bias in biases) else bias_N.to(self._dtype)
        self._weight = weight_NK.to(self._dtype).contiguous()
        self._packed = packs(self._weight)
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACKED_FOR_ROWS)

    def __call__(self, x_MK: Tensor) -> Tensor:
        """[M, K] to [M, N], in this matrix's precision."""
        x_MK = x_MK.to(self._dtype)
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x_MK, self._weight, self._bias)


def packs(weight: Tensor) -> bool:
    """Whether oneDNN packs such a matrix here: on a CPU, bf16 where the processor multiplies it."""
    ops = torch.ops.mkldnn  # private names: a torch without them multiplies as usual
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not (hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")):
        return False
    return weight.dtype == torch.float32 or bool(ops._is_mkldnn_bf16_supported())


def activation(module: nn.Module | str) -> Callable[[Tensor], Tensor]:
    """The module's activation; GPT-2's and T5's tanh GELU in one kernel instead of eight."""
    module = ACT2FN[module] if isinstance(module, str) else module
    if type(module).__name__ in ("NewGELUActivation", "FastGELUActivation", "GELUTanh"):
        return lambda x: F.gelu(x, approximate="tanh")
    return module


def rms_normed(x_MD: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + ε) in float32; the gain belongs to the matrix that follows. Zhang & Sennrich 2019."""
    return x_MD * torch.rsqrt(x_MD.square().mean(-1, keepdim=True) + epsilon)
