"""The records that rooms hand to each other. B rows  T tokens  C,H,W pixels  D width of the shared space."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

Metrics = dict[str, float]
"""Names as in `runtime/metrics.py`'s table, values as plain numbers."""


@dataclass(frozen=True, slots=True)
class ImageText:
    """One sample as a source gives it: an encoded picture and the captions that fit it.

    `ImageText(name="U+1F436.png", image=b"\\x89PNG…", captions=("dog face", "puppy"))`
    """

    name: str
    """What to call the sample in an error or a gallery."""
    image: bytes
    """The encoded file (PNG, JPEG, WebP, …)."""
    captions: tuple[str, ...]
    """At least one; the first is the sample's own name."""


@dataclass(frozen=True, slots=True)
class ImageTextBatch:
    """Pairs ready for a dual encoder, row i of each tensor belonging together."""

    pixels_BCHW: Tensor
    """uint8 [B, 3, H, W] on the way, float32 normalised once it is on the device (see `models.clip`)."""
    token_ids_BT: Tensor
    """int64 [B, T], right-padded."""
    mask_BT: Tensor
    """int64 [B, T], 1 at real tokens."""
    caption_key_B: Tensor
    """int64 [B], equal for equal captions: such rows are positives of each other."""

    def __len__(self) -> int:
        return self.pixels_BCHW.shape[0]

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return replace(
            self, **{name: getattr(self, name).to(device, non_blocking=True) for name in self.__slots__}
        )

    def rows(self, rows: slice) -> Self:
        """A micro-batch: the same rows of every tensor."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.__slots__})
