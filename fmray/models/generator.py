"""From what a picture should show to a picture: one protocol, and the nearest picture of a collection.

The output side of a multimodal LLM says what to show as a vector of some space; a generator makes a picture of it. Here the space
is a dual encoder's and the picture is found, not made. A diffusion model fits behind the same protocol: its space is that of its
own text encoder (GILL maps to Stable Diffusion's, 77 tokens of 768 numbers, as NExT-GPT and DreamLLM do), `output.clip` then
names that encoder, and `generate` denoises under the vectors as condition instead of looking one up.

B wanted pictures  M pictures of the collection  D width of the space
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fmray.errors import DataError


@dataclass(frozen=True, slots=True)
class GeneratedPicture:
    """A picture that answers. `GeneratedPicture("test/17", b"\\x89PNG…", 0.61, (("test/17", 0.61), ("test/4", 0.55)))`"""

    key: str
    """What the generator calls it."""
    image: bytes
    """The encoded file."""
    cosine: float
    """Between what was asked for and the picture."""
    nearest: tuple[tuple[str, float], ...] = ()
    """The best of a collection with their cosines, itself first; empty where a picture is made."""


class Generator(Protocol):
    """Makes or finds pictures."""

    def generate(self, embeddings_BD: Tensor) -> list[GeneratedPicture]:
        """A picture for each vector, float [B, D], norm 1; raises DataError where they are of another width."""
        ...


@dataclass(frozen=True, slots=True)
class NearestPicture:
    """Exact search by cosine. `NearestPicture(keys, embeds_MD, source.picture).generate(embeddings_BD)`"""

    keys: tuple[str, ...]
    """One per picture."""
    embeds_MD: Tensor
    """float32 [M, D], norm 1, M at least 1."""
    read: Callable[[str], bytes]
    """The encoded picture of a key."""
    top: int = 5
    """How many of the best are named."""

    def generate(self, embeddings_BD: Tensor) -> list[GeneratedPicture]:
        made = []
        for nearest in self.search(embeddings_BD):
            key, cosine = nearest[0]
            made.append(GeneratedPicture(key, self.read(key), cosine, nearest))
        return made

    def search(self, embeddings_BD: Tensor) -> list[tuple[tuple[str, float], ...]]:
        """The `top` best keys and cosines of each, best first, of equal ones the earlier; no picture is read."""
        cosine_BM = self._checked(embeddings_BD) @ self.embeds_MD.T.double()
        found = cosine_BM.sort(dim=1, descending=True, stable=True)
        best: Sequence[tuple[list[float], list[int]]] = list(
            zip(found.values[:, : self.top].tolist(), found.indices[:, : self.top].tolist(), strict=True)
        )
        return [tuple((self.keys[row], cosine) for cosine, row in zip(*each, strict=True)) for each in best]

    def _checked(self, embeddings_BD: Tensor) -> Tensor:
        if embeddings_BD.dim() != 2 or embeddings_BD.shape[1] != self.embeds_MD.shape[1]:
            shape = tuple(embeddings_BD.shape)
            raise DataError(
                f"generator: embeddings of shape {shape}, but its pictures have width {self.embeds_MD.shape[1]}"
            )
        if not bool(torch.isfinite(embeddings_BD).all()):
            raise DataError("generator: the embeddings are not finite: the model has diverged")
        return embeddings_BD.to(self.embeds_MD.device).double()
