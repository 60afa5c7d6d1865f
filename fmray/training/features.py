"""A locked picture tower runs once per picture: its outputs on the disk, by tower and picture.

<cache>/features/<hash of tower, preparation and precision>/<hash of the encoded picture>.safetensors

N pictures  P tokens of a picture  F width of the tower  S side of the square input
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fmray.config.loading import cache_folder
from fmray.data.dialogue_loader import decoded_pictures
from fmray.data.dialogues import DialogueSource
from fmray.models.answering import Answering
from fmray.training.engine import autocast
from fmray.types import Pictures

AT_ONCE = 16
"""Pictures the tower reads at once, always: what a picture becomes must not depend on what stood beside it."""
MEBIBYTE = 1 << 20


def tower_hash(answering: Answering, tower: nn.Module, precision: str) -> str:
    """What makes two towers' features equal: weights, architecture, the picture's preparation, the arithmetic."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode() + str(tensor.dtype).encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    config = answering.model.config.to_json_string(use_diff=False)
    digest.update((config + answering.image.model_dump_json() + precision).encode())
    return digest.hexdigest()[:24]


@dataclass
class FeatureCache:
    """`FeatureCache(…).pictures(keys)`: what the tower makes of pictures, from memory, the disk, or now."""

    answering: Answering
    source: DialogueSource
    device: torch.device
    precision: str
    memory: int
    """Bytes of features that are kept in this process."""
    folder: Path = field(init=False)
    made: int = 0
    """Pictures that the tower has read in this process."""
    _held: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def __post_init__(self) -> None:
        tower = self.answering.model.vision
        self.folder = cache_folder() / "features" / tower_hash(self.answering, tower, self.precision)
        self.folder.mkdir(parents=True, exist_ok=True)

    def pictures(self, keys: tuple[str, ...]) -> Pictures:
        """Features of some pictures, float [N, P, F] on the CPU; raises DataError where one cannot be read."""
        found = {key: tensor for key in keys if (tensor := self._known(key)) is not None}
        missing = [key for key in keys if key not in found]
        for start in range(0, len(missing), AT_ONCE):
            found |= self._make(missing[start : start + AT_ONCE])
        return Pictures(keys, features_NPF=torch.stack([found[key] for key in keys]) if keys else None)

    def _known(self, key: str) -> Tensor | None:
        if key in self._held:
            return self._held[key]
        try:
            tensor = load_file(self._file(key))["features_PF"]
        except (FileNotFoundError, SafetensorError):  # not made yet, or its writer was killed
            return None
        return self._hold(key, tensor)

    def _file(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(self.source.picture(key)).hexdigest()}.safetensors"

    def _hold(self, key: str, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if self._bytes + size <= self.memory:
            self._held[key] = tensor
            self._bytes += size
        return tensor

    @torch.no_grad()
    def _make(self, keys: list[str]) -> dict[str, Tensor]:
        pixels_NCHW = decoded_pictures(self.source, keys, self.answering.image).pixels_NCHW
        assert pixels_NCHW is not None
        room = pixels_NCHW.new_zeros(AT_ONCE - len(keys), *pixels_NCHW.shape[1:])
        padded = torch.cat([pixels_NCHW, room]).to(self.device)
        with autocast(self.device, self.precision):
            features_NPF = self.answering.picture_features(padded)[: len(keys)].cpu()
        made = {}
        for key, features_PF in zip(keys, features_NPF, strict=True):
            made[key] = self._hold(key, features_PF.contiguous().clone())
            self._write(self._file(key), made[key])
        self.made += len(keys)
        return made

    def _write(self, path: Path, features_PF: Tensor) -> None:
        """Into place in one step: several ranks and runs may share the folder."""
        part = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({"features_PF": features_PF}, part)
        os.replace(part, path)
