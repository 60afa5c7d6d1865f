"""From encoded pictures to pixels: decoding that survives hostile files, backgrounds, batched augmentation.

B rows  C channels  H,W pixels  S side of the square input. Everything random is a function of a row's own
seed, so a row looks the same whatever stands beside it in the batch, on any worker, resumed or not.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from fmray.config.schema import AugmentConfig, ImageConfig
from fmray.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is decoded; Pillow's other forty decoders stay shut."""

Fault = Literal["empty", "format", "pixels", "damaged"]

# What Pillow raises for damaged bytes (test_transforms flips them): OSError is its own, the rest slips by.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    MemoryError,
)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of this EXIF orientation upright."""

_EIGHT_OF_SIXTEEN_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)
"""The nearest eighth bit: 65,535 to 255, 32,896 to 128."""


# --------------------------------------------------------------------------------------------------- decoding


class PictureError(DataError):
    """A picture that cannot be decoded.

    `PictureError("input[3]", "damaged", "the picture is truncated or damaged", "broken PNG file")`
    """

    def __init__(self, name: str, fault: Fault, facts: str, detail: str = "") -> None:
        super().__init__(f"{name}: {facts} ({detail})" if detail else f"{name}: {facts}")
        self.name, self.fault, self.facts, self.detail = name, fault, facts, detail
        # `facts` are our words and fit for strangers; `detail` is Pillow's own text, which may hold an address

    def __reduce__(self) -> tuple[type[PictureError], tuple[str, Fault, str, str]]:
        return type(self), (self.name, self.fault, self.facts, self.detail)  # it crosses Ray's processes


def decode_rgba(data: bytes, image: ImageConfig, *, name: str, max_pixels: int = 40_000_000) -> Tensor:
    """One encoded picture as uint8 [4, S, S]: straight (not premultiplied) alpha, 255 where there is none.

    Decoded, turned and fitted by `decode_picture`, whose errors it raises.
    """
    fitted = decode_picture(data, image, name=name, max_pixels=max_pixels)
    pixels_HWC = torch.from_numpy(np.array(fitted.convert("RGBA")))
    return pixels_HWC.permute(2, 0, 1).contiguous()


def decode_picture(
    data: bytes, image: ImageConfig, *, name: str, max_pixels: int, max_side: int = 65_535
) -> Image.Image:
    """One encoded picture as a square of side S, RGB, or RGBA with straight alpha where it can be transparent.

    Turned upright by its EXIF orientation (damaged EXIF turns nothing); the first frame of an animation; 16
    bits are scaled to 8; colour profiles are not applied. `crop` cuts the centre square, `stretch` ignores the
    proportions, `pad` adds white borders (transparent ones where the picture has an alpha channel). Raises
    PictureError with the sample's name: empty, of another format, damaged, truncated, or by its header, which
    is read before anything is decoded, of more than `max_pixels` or with a side of more than `max_side`.
    """
    if not data:
        raise PictureError(name, "empty", "the picture is empty (0 bytes)")
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(opened.size, name, max_pixels, max_side)
        # A large JPEG is decoded at 1/2, 1/4 or 1/8 of its side, never below twice the square's.
        opened.draft(None, (2 * image.size, 2 * image.size))
        opened.load()
        return _fit(_rgb_or_rgba(_upright(opened)), image)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(name, "format", "is not a PNG, JPEG, WebP, GIF or BMP picture") from None
    except _BOMB as error:  # Pillow's own limit, 179 million
        raise PictureError(name, "pixels", "has too many pixels to decode", _first_line(error)) from None
    except _DAMAGED as error:
        facts = "the picture is truncated or damaged"
        raise PictureError(name, "damaged", facts, _first_line(error)) from None


def _check_size(size: tuple[int, int], name: str, max_pixels: int, max_side: int) -> None:
    if size[0] * size[1] > max_pixels:
        facts = f"has {size[0]} x {size[1]} pixels, more than the allowed {max_pixels:,}"
        raise PictureError(name, "pixels", facts)
    if max(size) > max_side:
        facts = f"has {size[0]} x {size[1]} pixels, a side of more than the allowed {max_side:,}"
        raise PictureError(name, "pixels", facts)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _upright(opened: Image.Image) -> Image.Image:
    try:
        orientation = opened.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGED:  # the pixels are sound: browsers show such a picture as it is stored
        return opened
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return opened if turn is None else opened.transpose(turn)


def _rgb_or_rgba(opened: Image.Image) -> Image.Image:
    """Any mode as RGB, or as RGBA where it can be transparent."""
    if opened.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        opened = Image.fromarray(_EIGHT_OF_SIXTEEN_BITS[np.asarray(opened).clip(0, 65_535)])
    mode = "RGBA" if opened.has_transparency_data else "RGB"
    return opened if opened.mode == mode else opened.convert(mode)


def _fit(picture: Image.Image, image: ImageConfig) -> Image.Image:
    """A square of side `image.size`. Pillow resizes RGBA premultiplied, so edges get no dark fringe."""
    side, (width, height) = image.size, picture.size
    bicubic = Image.Resampling.BICUBIC
    if image.fit == "stretch" or width == height:
        return picture.resize((side, side), bicubic)
    if image.fit == "crop":
        cut = min(width, height)
        left, top = (width - cut) / 2, (height - cut) / 2
        return picture.resize((side, side), bicubic, box=(left, top, left + cut, top + cut))
    longer = max(width, height)
    inner = (max(1, round(width * side / longer)), max(1, round(height * side / longer)))
    canvas = Image.new(picture.mode, (side, side), (255, 255, 255, 0)[: len(picture.getbands())])
    canvas.paste(picture.resize(inner, bicubic), ((side - inner[0]) // 2, (side - inner[1]) // 2))
    return canvas


# ------------------------------------------------------------------------------------------------- background


def compose(rgba_B4HW: Tensor, background_B3: Tensor) -> Tensor:
    """Pictures over plain backgrounds: uint8 [B, 4, H, W] and uint8 [B, 3] to uint8 [B, 3, H, W]."""
    alpha_B1HW = rgba_B4HW[:, 3:].float().div_(255)
    under_B311 = background_B3.float()[:, :, None, None]
    over_BCHW = rgba_B4HW[:, :3].float().sub_(under_B311).mul_(alpha_B1HW).add_(under_B311)
    return over_BCHW.round_().to(torch.uint8)


def white(n: int) -> Tensor:
    """uint8 [n, 3], all 255."""
    return torch.full((n, 3), 255, dtype=torch.uint8)


def random_backgrounds(seeds: Sequence[int]) -> Tensor:
    """uint8 [B, 3], a uniform colour per row, each a function of its seed alone."""
    uniform_B3 = _uniform(seeds, 3, stream=1)
    return torch.from_numpy((uniform_B3 * 256).astype(np.uint8))


# ----------------------------------------------------------------------------------------------- augmentation


_BYTES_AT_ONCE = 2_400_000  # of float32: it stays in a core's cache, which makes it 2.5 times as fast


def augment(rgba_B4HW: Tensor, config: AugmentConfig, seeds: Sequence[int]) -> Tensor:
    """Mirrored, turned, shifted, scaled and recoloured pictures: uint8 [B, 4, H, W] to the same.

    One bilinear resampling of premultiplied colours; what comes in from outside is transparent. Row i is a
    function of (its pixels, seeds[i], config) alone, bit for bit: nothing is reduced over a row or a batch.
    """
    if len(seeds) != len(rgba_B4HW):
        raise ValueError(f"{len(rgba_B4HW)} pictures and {len(seeds)} seeds")
    if not config.active or not len(seeds):
        return rgba_B4HW.clone()
    uniform_BK = torch.from_numpy(_uniform(seeds, 8, stream=0))
    rows_at_once = max(1, _BYTES_AT_ONCE // (4 * rgba_B4HW[0].numel()))
    parts = [slice(start, start + rows_at_once) for start in range(0, len(seeds), rows_at_once)]
    return torch.cat([_augment_rows(rgba_B4HW[rows], uniform_BK[rows], config) for rows in parts])


def _augment_rows(rgba_B4HW: Tensor, uniform_BK: Tensor, config: AugmentConfig) -> Tensor:
    premultiplied_B4HW = rgba_B4HW.float()
    premultiplied_B4HW[:, :3] *= premultiplied_B4HW[:, 3:] / 255
    if config.flip or config.rotate or config.translate or config.scale:
        grid_BHW2 = _grid(uniform_BK[:, :5], config, *rgba_B4HW.shape[2:])
        premultiplied_B4HW = F.grid_sample(
            premultiplied_B4HW, grid_BHW2, mode="bilinear", align_corners=False
        )
    if config.color:
        _recolor(premultiplied_B4HW, uniform_BK[:, 5:], config.color)
    alpha_B1HW = premultiplied_B4HW[:, 3:]
    premultiplied_B4HW[:, :3] *= 255 / alpha_B1HW.clamp_min(
        0.5
    )  # below 0.5 alpha rounds to 0: no colour to save
    return premultiplied_B4HW.round_().clamp_(0, 255).to(torch.uint8)


def _uniform(seeds: Sequence[int], count: int, *, stream: int) -> NDArray[np.float64]:
    """[B, count] numbers in [0, 1): Philox keyed by the row's seed; streams of one seed are independent."""
    start = stream << 128  # the upper half of the 256-bit counter
    rows = [np.random.Generator(np.random.Philox(key=seed, counter=start)).random(count) for seed in seeds]
    return np.stack(rows) if rows else np.empty((0, count))


def _grid(uniform_B5: Tensor, config: AugmentConfig, height: int, width: int) -> Tensor:
    """Where each output pixel is read: float32 [B, H, W, 2] in grid_sample's coordinates (x, y), -1 to 1."""
    flip_B, angle_B, right_B, down_B, zoom_B = uniform_B5.unbind(1)
    mirror_B = torch.where(flip_B < config.flip, -1.0, 1.0)
    angle_B = (2 * angle_B - 1) * math.radians(config.rotate)
    right_B = (2 * right_B - 1) * config.translate * width
    down_B = (2 * down_B - 1) * config.translate * height
    zoom_B = torch.exp(
        (1 - 2 * zoom_B) * math.log(1 - config.scale)
    )  # 0.2: 0.8 to 1.25, even in the logarithm
    cos_B, sin_B = torch.cos(angle_B) / zoom_B, torch.sin(angle_B) / zoom_B

    def cell(values_B: Tensor) -> Tensor:
        return values_B.float()[:, None, None]

    x_W = torch.arange(width) + 0.5 - width / 2
    y_H1 = (torch.arange(height) + 0.5 - height / 2)[:, None]
    x_BHW, y_BHW = x_W - cell(right_B), y_H1 - cell(down_B)  # the way back: shift, turn and zoom, mirror
    source_x_BHW = (cell(cos_B) * x_BHW + cell(sin_B) * y_BHW) * cell(mirror_B)
    source_y_BHW = cell(cos_B) * y_BHW - cell(sin_B) * x_BHW
    return torch.stack([source_x_BHW * (2 / width), source_y_BHW * (2 / height)], dim=3)


def _recolor(premultiplied_B4HW: Tensor, uniform_B3: Tensor, strength: float) -> None:
    """In place: brightness, contrast about middle grey, saturation, each by a factor of 1 ± strength."""
    factor_B3 = (1 + (2 * uniform_B3 - 1) * strength).float()
    bright_B, contrast_B, saturation_B = (f_B[:, None, None, None] for f_B in factor_B3.unbind(1))
    color_B3HW, alpha_B1HW = premultiplied_B4HW[:, :3], premultiplied_B4HW[:, 3:]
    red, green, blue = color_B3HW[:, 0:1], color_B3HW[:, 1:2], color_B3HW[:, 2:3]
    grey_B1HW = 0.299 * red + 0.587 * green + 0.114 * blue
    gain_B = bright_B * contrast_B
    color_B3HW.mul_(gain_B * saturation_B)
    color_B3HW.add_(grey_B1HW * (gain_B * (1 - saturation_B)) + alpha_B1HW * (0.5 * (1 - contrast_B)))
