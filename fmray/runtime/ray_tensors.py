"""Torch tensors through Ray: bytes beside the pickle, so that they are copied into shared memory once. Imports ray.

Ray pickles a torch tensor through torch's own format, inside the pickle and with its whole storage: eight rows of a batch would
carry the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray.util
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]


def carry_tensors() -> None:
    """From now on this process sends CPU tensors as plain bytes; what arrives is the receiver's own, to write on as it likes."""
    ray.util.register_serializer(Tensor, serializer=_packed, deserializer=_unpacked)


def bytes_of(tensor: Tensor) -> Bytes:
    """The bytes of a contiguous CPU tensor of any dtype, not copied."""
    flat: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat


def _packed(tensor: Tensor) -> tuple[Any, ...]:
    plain = tensor.layout is torch.strided and not (
        tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    )
    if tensor.device.type != "cpu" or tensor.requires_grad or not plain:
        return tuple(tensor.__reduce_ex__(5)[:2])  # type: ignore[no-untyped-call]
    return bytes_of(tensor.contiguous()), tensor.dtype, tuple(tensor.shape)


def _unpacked(packed: tuple[Any, ...]) -> Tensor:
    if len(packed) == 2:
        rebuild, arguments = packed
        rebuilt: Tensor = rebuild(*arguments)
        return rebuilt
    array, dtype, shape = packed
    tensor = torch.empty(shape, dtype=dtype)
    if array.size:
        np.copyto(bytes_of(tensor), array)
    return tensor
