"""What the picture tower made of the last pictures: a talk about one sends it again with every question.

N pictures  P tokens of a picture  F width of the tower
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmray.types import Pictures

AT_ONCE = 32
"""Pictures that pass the tower together."""


class PictureMemory:
    """Towers' tokens by the pictures' keys, on the model's device; the oldest go where there are more MiB than allowed."""

    def __init__(self, tower: Callable[[Tensor], Tensor], device: torch.device, mib: float) -> None:
        self._tower, self._device, self._most = tower, device, int(mib * 2**20)
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = 0
        """What is held."""

    def on_device(self, tensor: Tensor) -> Tensor:
        """Where the model is."""
        return tensor.to(self._device)

    def of(self, given: Sequence[tuple[str, Pictures]]) -> Pictures:
        """Distinct pictures, each among others as it was given, as features; the tower reads those that it has not seen."""
        if not given:
            return Pictures(())
        found: dict[str, Tensor] = {}
        unseen = []
        for key, pictures in given:
            if pictures.features_NPF is not None:
                found[key] = pictures.features_NPF[pictures.keys.index(key)].to(self._device)
            elif key in self._held:
                self._held.move_to_end(key)
                found[key] = self._held[key]
            else:
                assert pictures.pixels_NCHW is not None, "pictures are pixels or features"
                unseen.append((key, pictures.pixels_NCHW[pictures.keys.index(key)]))
        for start in range(0, len(unseen), AT_ONCE):
            some = unseen[start : start + AT_ONCE]
            made_NPF = self._tower(torch.stack([pixels for _, pixels in some]).to(self._device))
            for (key, _), made_PF in zip(some, made_NPF, strict=True):
                found[key] = made_PF
                self._remember(key, made_PF)
        keys = tuple(key for key, _ in given)
        return Pictures(keys, features_NPF=torch.stack([found[key] for key in keys]))

    def _remember(self, key: str, made_PF: Tensor) -> None:
        size = made_PF.numel() * made_PF.element_size()
        if size > self._most:
            return
        self._held[key] = made_PF.clone()  # a row alone: a view would hold the whole batch
        self.bytes += size
        while self.bytes > self._most:
            _, oldest = self._held.popitem(last=False)
            self.bytes -= oldest.numel() * oldest.element_size()
