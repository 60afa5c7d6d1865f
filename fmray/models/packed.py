"""Towers that only answer, on a CPU: matrices and convolutions in oneDNN's own layout, the activation in the same pass.

The same function to rounding. A ViT-B/32 is about twice as fast on one core of an AMD EPYC, where MKL's fp32 product reaches
half of oneDNN's; a MobileNetV2 too, whose ReLU6 would read and write every feature map once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import MobileNetV2ConvLayer

from fmray.models.decoding.weights import PACKED_FOR_ROWS, packs
from fmray.models.towers import fold_batch_norm

RELU6 = [0.0, 6.0]


def pack_for_answers(tower: nn.Module) -> None:
    """Replace a tower's linear layers, and a MobileNetV2's convolutions, in place; where oneDNN is not there, nothing happens.

    For an evaluated model in fp32 that nobody trains, saves or moves from now on: packed weights are no parameters. Layers of a
    subclass (LoRA's, quantised ones) stay.
    """
    fold_batch_norm(tower)
    for parent in tower.modules():
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and packs(child.weight):
                setattr(parent, name, PackedLinear(child))
            elif isinstance(child, MobileNetV2ConvLayer) and _fuses(child):
                setattr(parent, name, FusedConvolution(child))


class PackedLinear(nn.Module):
    """y = x Wᵀ + b over the last dimension."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._bias = None if layer.bias is None else layer.bias.detach()
        weight_NK = layer.weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_NK, PACKED_FOR_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., K] to [..., N]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


class FusedConvolution(nn.Module):
    """A MobileNetV2ConvLayer whose BatchNorm is folded: the convolution and its ReLU6 in one pass."""

    def __init__(self, layer: MobileNetV2ConvLayer) -> None:
        super().__init__()
        convolution = layer.convolution
        self._bias = None if convolution.bias is None else convolution.bias.detach()
        self._shape: tuple[Any, ...] = (
            list(convolution.padding),
            list(convolution.stride),
            list(convolution.dilation),
            convolution.groups,
        )
        self._then: tuple[Any, ...] = ("none", [], "")
        if layer.activation is not None:
            self._then = ("hardtanh", RELU6, "")
        reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
        self._weight = reorder(convolution.weight.detach().to_mkldnn(), *self._shape)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """float32 to float32, channels last."""
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            features_BCHW, self._weight, self._bias, *self._shape, *self._then
        )
        return y


def _fuses(layer: MobileNetV2ConvLayer) -> bool:
    """Whether it is a convolution with equal padding on all sides, no BatchNorm any more, and ReLU6 or nothing behind it."""
    if not packs(layer.convolution.weight) or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    plain = isinstance(layer.normalization, nn.Identity | None) and not layer.config.tf_padding
    return plain and isinstance(layer.activation, nn.ReLU6 | None)
