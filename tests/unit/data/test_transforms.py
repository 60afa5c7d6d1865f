"""Decoding of ordinary and hostile pictures, backgrounds, augmentation."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fmray.config.schema import AugmentConfig, ImageConfig
from fmray.data.transforms import augment, compose, decode_rgba, random_backgrounds, white
from fmray.errors import DataError

SMALL = ImageConfig(size=16)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def noise(size: tuple[int, int] = (40, 30), mode: str = "RGBA") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def halves(width: int = 40, height: int = 40) -> Image.Image:
    """Red above blue."""
    picture = Image.new("RGB", (width, height), RED)
    picture.paste(BLUE, (0, height // 2, width, height))
    return picture


def decode(data: bytes, image: ImageConfig = SMALL) -> Tensor:
    rgba_4HW = decode_rgba(data, image, name="the sample")
    assert (rgba_4HW.shape, rgba_4HW.dtype) == ((4, image.size, image.size), torch.uint8)
    return rgba_4HW


def color_at(rgba_4HW: Tensor, y: int, x: int) -> tuple[int, ...]:
    return tuple(rgba_4HW[:3, y, x].tolist())


# -------------------------------------------------------------------------------- ordinary


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_opaque(kind: str) -> None:
    rgba_4HW = decode(encoded(halves(), kind))
    assert (rgba_4HW[3] == 255).all()
    np.testing.assert_allclose(color_at(rgba_4HW, 3, 8), RED, atol=8)
    np.testing.assert_allclose(color_at(rgba_4HW, 13, 8), BLUE, atol=8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_png_mode(mode: str) -> None:
    decode(encoded(Image.new(mode, (20, 20)) if mode == "I;16" else noise(mode=mode)))


def test_cmyk_jpeg() -> None:
    rgba_4HW = decode(encoded(halves().convert("CMYK"), "JPEG"))
    np.testing.assert_allclose(color_at(rgba_4HW, 3, 8), RED, atol=8)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    pixels_HW = np.full((8, 8), 32896, dtype=np.uint16)  # 128 * 257
    pixels_HW[:4] = 65535
    rgba_4HW = decode(encoded(Image.fromarray(pixels_HW)), ImageConfig(size=8))
    assert (color_at(rgba_4HW, 0, 0), color_at(rgba_4HW, 7, 0)) == ((255,) * 3, (128,) * 3)


def test_palette_with_transparency() -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(0, (0, 0, 8, 4))
    rgba_4HW = decode(encoded(picture, transparency=0), ImageConfig(size=8))
    assert (rgba_4HW[3, 0, 0], rgba_4HW[3, 7, 7]) == (0, 255)


@pytest.mark.parametrize(("orientation", "red_at"), [(1, (3, 8)), (3, (13, 8)), (6, (8, 13)), (8, (8, 3))])
def test_exif_orientation(orientation: int, red_at: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgba_4HW = decode(encoded(halves(), "JPEG", exif=exif, quality=95))
    np.testing.assert_allclose(color_at(rgba_4HW, *red_at), RED, atol=8)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), BLUE)]
    data = encoded(Image.new("RGB", (16, 16), RED), kind, save_all=True, append_images=frames)
    np.testing.assert_allclose(color_at(decode(data), 8, 8), RED, atol=8)


def test_fits() -> None:
    wide = Image.new("RGB", (32, 16), RED)
    wide.paste(BLUE, (0, 0, 8, 16))
    data = encoded(wide)
    assert color_at(decode(data), 8, 0) == RED  # the blue quarter is cut away
    assert color_at(decode(data, ImageConfig(size=16, fit="stretch")), 8, 0) == BLUE
    padded_4HW = decode(data, ImageConfig(size=16, fit="pad"))
    assert color_at(padded_4HW, 0, 8) == (255, 255, 255)
    assert (padded_4HW[3] == 255).all()
    assert color_at(padded_4HW, 8, 0) == BLUE
    clear_4HW = decode(encoded(wide.convert("RGBA")), ImageConfig(size=16, fit="pad"))
    assert (clear_4HW[3, 0, 0], clear_4HW[3, 8, 8]) == (0, 255)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1), (3, 2000)])
@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_extreme_proportions(size: tuple[int, int], fit: str, kind: str) -> None:
    decode(encoded(Image.new("RGB", size, RED), kind), ImageConfig.model_validate({"size": 16, "fit": fit}))


def test_no_dark_fringe_around_transparent_pictures() -> None:
    """White discs on transparent black: whatever is half transparent after resizing is still white."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 255, 255, 255), (17, 17, 47, 47))
    rgba_4HW = decode(encoded(picture), ImageConfig(size=23))
    seen_HW = rgba_4HW[3] > 8
    assert seen_HW.any()
    assert rgba_4HW[:3, seen_HW].min() >= 250


def test_large_jpeg_decoded_small_is_the_same_picture() -> None:
    large = encoded(halves(1600, 1600), "JPEG", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(large)).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    np.testing.assert_allclose(decode(large)[:3].permute(1, 2, 0).numpy().astype(int), whole, atol=6)


# -------------------------------------------------------------------------------- hostile


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [7000, 12_000, 60_000])
def test_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(DataError, match=r"the sample: .* pixels"):
        decode(png_header(side, side))


def test_max_pixels_is_the_callers() -> None:
    with pytest.raises(DataError, match="has 40 x 30 pixels, more than the allowed 1,000"):
        decode_rgba(encoded(noise()), SMALL, name="x", max_pixels=1000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(kind: str, share: float) -> None:
    data = encoded(noise(mode="RGB"), kind)
    with pytest.raises(DataError, match="the sample: ") as error:
        decode(data[: int(len(data) * share)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"hello, I am text", "is not a PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a PNG"),
        (encoded(noise(mode="RGB"), "TIFF"), "is not a PNG"),
        (encoded(noise(mode="RGB"), "PPM"), "is not a PNG"),
    ],
)
def test_what_is_no_picture_is_said(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=f"the sample: .*{said}"):
        decode(data)


def test_flipped_bytes_give_a_picture_or_a_data_error() -> None:
    """4,000 damaged files of each kind and mode: nothing of Pillow's gets out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [
        *(encoded(noise(), kind) for kind in ("PNG", "WEBP")),
        *(encoded(noise(mode="RGB"), kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")),
        *(encoded(noise(mode=mode), "PNG") for mode in ("1", "LA", "P")),
        encoded(Image.new("I;16", (40, 30), 40_000)),
        *(encoded(noise(mode="P"), kind) for kind in ("GIF", "BMP")),
        encoded(noise(mode="CMYK"), "JPEG"),
        encoded(noise(mode="P"), "GIF", save_all=True, append_images=[noise(mode="P").rotate(90)]),
    ]
    draw, outcomes = random.Random(0), {"picture": 0, "error": 0}
    for _ in range(4000):
        damaged = bytearray(draw.choice(pictures))
        for _ in range(draw.choice([1, 1, 2, 5, 20])):
            damaged[draw.randrange(min(len(damaged), draw.choice([64, 200, 10**6])))] = draw.randrange(256)
        try:
            decode(bytes(damaged))
            outcomes["picture"] += 1
        except DataError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 400


# -------------------------------------------------------------------------------- backgrounds


def test_compose_is_exact_where_alpha_is_0_or_255() -> None:
    rgba_B4HW = torch.randint(
        0, 256, (8, 4, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    rgba_B4HW[:, 3, :2], rgba_B4HW[:, 3, 3:] = 0, 255
    under_B3 = random_backgrounds(range(8))
    over_BCHW = compose(rgba_B4HW, under_B3)
    assert (over_BCHW.dtype, over_BCHW.shape) == (torch.uint8, (8, 3, 5, 7))
    assert torch.equal(over_BCHW[:, :, :2], under_B3[:, :, None, None].expand(8, 3, 2, 7))
    assert torch.equal(over_BCHW[:, :, 3:], rgba_B4HW[:, :3, 3:])
    between_BHW = rgba_B4HW[:, 3, 2].double()[:, None] / 255
    blend_BCW = rgba_B4HW[:, :3, 2].double() * between_BHW + under_B3[:, :, None].double() * (1 - between_BHW)
    assert (over_BCHW[:, :, 2].double() - blend_BCW).abs().max() <= 0.5 + 1e-4


def test_backgrounds() -> None:
    assert torch.equal(white(2), torch.full((2, 3), 255, dtype=torch.uint8))
    assert torch.equal(random_backgrounds([5, 6])[1:], random_backgrounds([6]))
    colors_B3 = random_backgrounds(range(2000)).float()
    assert (colors_B3.min(), colors_B3.max()) == (0, 255)
    np.testing.assert_allclose(colors_B3.mean(0), [127.5] * 3, atol=5)


# -------------------------------------------------------------------------------- augmentation

STRONG = AugmentConfig(flip=0.5, rotate=30, translate=0.1, scale=0.3, color=0.3)


def batch(rows: int, side: int = 33) -> Tensor:
    return torch.randint(
        0, 256, (rows, 4, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_nothing_configured_changes_nothing() -> None:
    rgba_B4HW = batch(3)
    assert torch.equal(augment(rgba_B4HW, AugmentConfig(), [1, 2, 3]), rgba_B4HW)
    assert augment(rgba_B4HW[:0], STRONG, []).shape == (0, 4, 33, 33)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_depends_on_its_pixels_and_seed_alone(threads: int) -> None:
    rgba_B4HW, seeds = batch(37), [2**62 + 3 * row for row in range(37)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together_B4HW = augment(rgba_B4HW, STRONG, seeds)
        alone_B4HW = torch.cat(
            [augment(rgba_B4HW[row : row + 1], STRONG, seeds[row : row + 1]) for row in range(37)]
        )
        order = torch.randperm(37, generator=torch.Generator().manual_seed(1)).tolist()
        shuffled_B4HW = augment(rgba_B4HW[order], STRONG, [seeds[row] for row in order])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together_B4HW, alone_B4HW)
    assert torch.equal(shuffled_B4HW, together_B4HW[order])
    assert not torch.equal(together_B4HW, augment(rgba_B4HW, STRONG, range(37)))


def test_flip_alone_is_exact() -> None:
    rgba_B4HW = batch(4)
    rgba_B4HW[:, 3] = 255
    assert torch.equal(augment(rgba_B4HW, AugmentConfig(flip=1), range(4)), rgba_B4HW.flip(3))
    flipped_B4HW = augment(rgba_B4HW[:1].expand(400, 4, 33, 33), AugmentConfig(flip=0.25), range(400))
    assert 60 < (flipped_B4HW != rgba_B4HW[0]).flatten(1).any(1).sum() < 140


def test_geometry_moves_what_it_says() -> None:
    """A dot at the centre stays there when turned or scaled, and moves by at most the share when shifted."""
    dot_B4HW = torch.zeros(64, 4, 41, 41, dtype=torch.uint8)
    dot_B4HW[:, :, 18:23, 18:23] = 255
    grid = torch.arange(41.0) - 20

    def centre(rgba_B4HW: Tensor) -> Tensor:
        weight_BHW = rgba_B4HW[:, 3].float()
        total_B = weight_BHW.sum((1, 2))
        return torch.stack([(weight_BHW.sum(1) @ grid) / total_B, (weight_BHW.sum(2) @ grid) / total_B], 1)

    assert centre(augment(dot_B4HW, AugmentConfig(rotate=180, scale=0.4), range(64))).abs().max() < 0.1
    moved_B2 = centre(augment(dot_B4HW, AugmentConfig(translate=0.2), range(64)))
    assert 7.5 < moved_B2.abs().max() <= 8.3
    assert moved_B2.mean(0).abs().max() < 1.5
    area_B = augment(dot_B4HW, AugmentConfig(scale=0.2), range(64))[:, 3].float().sum((1, 2)) / (25 * 255)
    assert area_B.min() > 0.8**2 - 0.03
    assert area_B.max() < 1.25**2 + 0.06
    assert area_B.max() - area_B.min() > 0.7


def test_outside_is_transparent_and_edges_keep_their_color() -> None:
    red_B4HW = torch.tensor([*RED, 255], dtype=torch.uint8)[None, :, None, None].expand(8, 4, 32, 32)
    turned_B4HW = augment(red_B4HW, AugmentConfig(rotate=45, translate=0.3), range(8))
    assert (turned_B4HW[:, 3] == 0).any()
    seen_BHW = turned_B4HW[:, 3] > 4
    assert turned_B4HW[:, 0][seen_BHW].min() >= 254
    assert turned_B4HW[:, 1][seen_BHW].max() == 0


def test_color_keeps_alpha_and_scales_brightness() -> None:
    grey_B4HW = torch.full((200, 4, 4, 4), 100, dtype=torch.uint8)
    changed_B4HW = augment(grey_B4HW, AugmentConfig(color=0.2), range(200))
    assert (changed_B4HW[:, 3] == 100).all()
    assert torch.equal(changed_B4HW[:, 0], changed_B4HW[:, 2])  # grey has no saturation to change
    values_B = changed_B4HW[:, 0, 0, 0].float()
    assert 70 <= values_B.min() < 85
    assert 115 < values_B.max() <= 122


def test_wrong_number_of_seeds() -> None:
    with pytest.raises(ValueError, match="2 pictures and 1 seeds"):
        augment(batch(2), STRONG, [1])
