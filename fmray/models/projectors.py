"""From the picture tower's tokens to the language model's.

N pictures  P tokens of a picture  F width of the tower  D width of the language model  r side of a shuffled block
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fmray.errors import ConfigError

ProjectorKind = Literal["linear", "mlp", "pixel_shuffle"]


class PixelShuffle(nn.Module):
    """r × r neighbours become one token r² times as wide, row by row: [N, h·w, F] to [N, h·w/r², F·r²].

    The inverse of Shi et al. 2016 ("sub-pixel convolution"), as Idefics and InternVL shorten pictures.
    """

    def __init__(self, grid: tuple[int, int], r: int) -> None:
        super().__init__()
        self.grid, self.r = grid, r

    def forward(self, features_NPF: Tensor) -> Tensor:
        (h, w), r, (N, _, F) = self.grid, self.r, features_NPF.shape
        blocks = features_NPF.view(N, h // r, r, w // r, r, F).transpose(2, 3)
        return blocks.reshape(N, (h // r) * (w // r), r * r * F)


def make_projector(
    kind: ProjectorKind, in_width: int, out_width: int, grid: tuple[int, int], shuffle: int
) -> nn.Module:
    """[N, h·w, F] to [N, `projected_tokens`, D]; `mlp` is LLaVA 1.5's `mlp2x_gelu` (Liu et al. 2023b, §3.2)."""
    projected_tokens(kind, grid, shuffle)
    if kind == "linear":
        return nn.Linear(in_width, out_width)
    if kind == "pixel_shuffle":
        return nn.Sequential(PixelShuffle(grid, shuffle), nn.Linear(in_width * shuffle**2, out_width))
    return nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))


def projected_tokens(kind: ProjectorKind, grid: tuple[int, int], shuffle: int) -> int:
    """P: tokens of a picture behind the projector. Raises ConfigError where a grid of h × w cannot be cut into blocks."""
    h, w = grid
    if kind != "pixel_shuffle":
        return h * w
    if h % shuffle or w % shuffle:
        cure = f"must divide the picture tower's grid of {h} x {w} tokens"
        raise ConfigError("model.projector.shuffle", shuffle, cure)
    return (h // shuffle) * (w // shuffle)
