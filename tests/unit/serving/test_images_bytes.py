"""Every picture of serving.md 6.5 against the real decoder: either the known pixels or the documented answer."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fmray.config.schema import ImageConfig
from fmray.data.transforms import compose, decode_rgba, white
from fmray.errors import RequestError
from fmray.serving.images import pixels_of, pixels_of_one
from fmray.serving.picture_cost import MOST_SCANS, MOST_SEGMENTS
from tests.hostile_pictures import (
    CORNERS,
    bad_checksum,
    bmp_of_size,
    chunk,
    encoded,
    exif_of,
    gif_with_frame,
    jpeg_of_many_scans,
    jpeg_of_size,
    jpeg_of_twelve_bits,
    known,
    png,
    tiff_tags,
    turned,
    webp_of_size,
    with_chunk,
    ycck,
    zeros,
)

STRETCH = ImageConfig(size=16, fit="stretch")
PNG, JPEG = encoded(known()), encoded(known(), "JPEG", quality=95, subsampling=0)
MOST_PIXELS = 1_000_000


def decoded(data: bytes, image: ImageConfig = STRETCH) -> Tensor:
    pixels_CHW = pixels_of_one(data, "input[3]", image, max_pixels=MOST_PIXELS)
    assert (pixels_CHW.shape, pixels_CHW.dtype) == ((3, image.size, image.size), torch.uint8)
    assert pixels_CHW.is_contiguous()
    return pixels_CHW


def corners(pixels_CHW: Tensor) -> list[list[int]]:
    side = pixels_CHW.shape[1]
    near, far = side // 4, side - 1 - side // 4
    return [pixels_CHW[:, y, x].tolist() for y in (near, far) for x in (near, far)]


def frames(kind: str, **options: object) -> bytes:
    """The known picture, then twenty black ones."""
    others = [Image.new("RGB", (48, 32), (place, 0, 0)) for place in range(20)]
    return encoded(known(), kind, save_all=True, append_images=others, **options)


def transparent(mode: str) -> Image.Image:
    """The known picture with nothing where its last corner was."""
    picture = known().convert("RGBA")
    picture.paste((0, 0, 0, 0), (24, 16, 48, 32))
    return picture.convert(mode)


def palette_transparent() -> bytes:
    picture = Image.new("P", (48, 32))
    picture.putpalette([value for color in CORNERS for value in color])
    for place, box in enumerate([(0, 0, 24, 16), (24, 0, 48, 16), (0, 16, 24, 32), (24, 16, 48, 32)]):
        picture.paste(place, box)
    return encoded(picture, transparency=3)


# ---------------------------------------------------------------------------------------------------- what is read

KNOWN = [list(color) for color in CORNERS]
HOLE = [*KNOWN[:3], [255, 255, 255]]
GREY = [[value] * 3 for value in (76, 150, 29, 226)]
READ: dict[str, tuple[bytes, list[list[int]], int]] = {
    "png": (PNG, KNOWN, 0),
    "png interlaced": (encoded(known(), interlace=1), KNOWN, 0),
    "jpeg": (JPEG, KNOWN, 4),
    "jpeg progressive": (encoded(known(), "JPEG", progressive=True, quality=95, subsampling=0), KNOWN, 4),
    "jpeg grey": (encoded(known().convert("L"), "JPEG", quality=95), GREY, 2),
    "jpeg cmyk": (encoded(known().convert("CMYK"), "JPEG", quality=95), KNOWN, 4),
    "jpeg ycck": (ycck(known()), KNOWN, 6),
    "jpeg of two pictures (MPO)": (
        encoded(
            known(),
            "MPO",
            quality=95,
            subsampling=0,
            save_all=True,
            append_images=[Image.new("RGB", (48, 32))],
        ),
        KNOWN,
        4,
    ),
    "jpeg of as many scans as are read": (jpeg_of_many_scans(MOST_SCANS), [[128] * 3] * 4, 1),
    "webp": (encoded(known(), "WEBP", lossless=True), KNOWN, 0),
    "webp lossy": (encoded(known(), "WEBP", quality=95), KNOWN, 12),
    "gif": (encoded(known(), "GIF"), KNOWN, 0),
    "bmp": (encoded(known(), "BMP"), KNOWN, 0),
    "palette": (encoded(known().quantize(4)), KNOWN, 0),
    "palette with transparency": (palette_transparent(), HOLE, 0),
    "rgba": (encoded(transparent("RGBA")), HOLE, 0),
    "rgba webp": (encoded(transparent("RGBA"), "WEBP", lossless=True), HOLE, 0),
    "grey with alpha": (encoded(transparent("LA")), [*GREY[:3], [255] * 3], 0),
    "rgb with a transparent colour": (encoded(known(), transparency=(255, 255, 0)), HOLE, 0),
    "one bit": (
        encoded(known().convert("L").point(lambda v: 255 * (v > 100)).convert("1")),
        [[0] * 3, [255] * 3] * 2,
        0,
    ),
    "sixteen bits": (
        encoded(Image.fromarray(np.asarray(known().convert("L")).astype(np.uint16) * 257)),
        GREY,
        0,
    ),
    "animated gif: the first frame": (frames("GIF"), KNOWN, 0),
    "animated webp: the first frame": (frames("WEBP", lossless=True), KNOWN, 0),
    "animated png: the first frame": (frames("PNG"), KNOWN, 0),
    "damaged frames behind the first": (frames("GIF")[:-30], KNOWN, 0),
    "a page behind the png": (PNG + b"<script>alert(1)</script>", KNOWN, 0),
    "an archive behind the jpeg": (JPEG + b"PK\x03\x04" + bytes(99) + b"\xff\xda" * 99, KNOWN, 4),
    "a script behind the gif": (encoded(known(), "GIF") + b"=1;alert(1)", KNOWN, 0),
    "a comment that reads like scans": (
        JPEG[:2] + b"\xff\xfe\1\2" + b"\xff\xda" * 128 + JPEG[2:],
        KNOWN,
        4,
    ),
    "unknown chunks": (with_chunk(PNG, chunk(b"prVt", b"?" * 99)), KNOWN, 0),
    "a profile that is none": (with_chunk(PNG, chunk(b"iCCP", b"x\0\0" + zeros(99))), KNOWN, 0),
    "one pixel": (encoded(Image.new("RGB", (1, 1), CORNERS[0])), KNOWN[:1] * 4, 0),
    "one row": (encoded(known(48, 2).crop((0, 0, 48, 1))), KNOWN[:2] * 2, 0),
    "one column": (encoded(known(2, 32).crop((0, 0, 1, 32))), [KNOWN[0]] * 2 + [KNOWN[2]] * 2, 0),
    "one row of jpeg": (
        encoded(known(48, 2).crop((0, 0, 48, 1)), "JPEG", quality=95, subsampling=0),
        KNOWN[:2] * 2,
        4,
    ),
    "as many pixels as are read": (encoded(known(1000, 1000)), KNOWN, 0),
    "as long a side as is read": (encoded(known(16_384, 32)), KNOWN, 0),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case: str) -> None:
    data, expected, tolerance = READ[case]
    np.testing.assert_allclose(corners(decoded(data)), expected, atol=tolerance)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("case", READ)
def test_pixels_are_those_of_training(case: str, fit: str) -> None:
    image = ImageConfig.model_validate({"size": 24, "fit": fit})
    data = READ[case][0]
    trained = compose(decode_rgba(data, image, name="x", max_pixels=MOST_PIXELS)[None], white(1))
    assert torch.equal(decoded(data, image)[None], trained)
    together = pixels_of([(data, "a"), (PNG, "b")], image, max_pixels=MOST_PIXELS)
    assert together is not None
    assert torch.equal(together[:1], trained)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(kind: str, orientation: int) -> None:
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(turned(orientation, known()), kind, exif=exif_of(orientation), **options)
    np.testing.assert_allclose(corners(decoded(data)), KNOWN, atol=4)


ORIENTATION = 0x0112
BROKEN_EXIF = {
    "not TIFF": b"Exif\0\0what is this",
    "nothing": b"Exif\0\0",
    "cut": tiff_tags((ORIENTATION, 3, 1, b"\6\0\0\0"))[:-9],
    "more entries than there are": tiff_tags((ORIENTATION, 3, 1, b"\1\0\0\0"), count=65_535),
    "a directory that follows itself": tiff_tags((ORIENTATION, 3, 1, b"\1\0\0\0"), after=8),
    "orientation 99": tiff_tags((ORIENTATION, 3, 1, b"\x63\0\0\0")),
    "orientation 0": tiff_tags((ORIENTATION, 3, 1, b"\0\0\0\0")),
    "a word for an orientation": tiff_tags((ORIENTATION, 2, 4, b"six\0")),
    "a fraction over nothing": tiff_tags((ORIENTATION, 5, 1, b"\0\0\0\0")),
    "values of four gigabytes": tiff_tags((ORIENTATION, 2, 2**32 - 1, b"\0\0\0\0")),
    "no such type": tiff_tags((ORIENTATION, 99, 1, b"\6\0\0\0")),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", BROKEN_EXIF)
def test_broken_exif_turns_nothing(case: str) -> None:
    data = encoded(known(), "JPEG", exif=BROKEN_EXIF[case], quality=95, subsampling=0)
    np.testing.assert_allclose(corners(decoded(data)), KNOWN, atol=4)


EXIF_OF_PNG = {
    "not TIFF": chunk(b"eXIf", b"what is this"),
    "nothing": chunk(b"eXIf", b""),
    "a directory nowhere": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    "hexadecimal text that is none": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz"),
    "a word in XMP": chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="six"/>'),
    "orientation 9 in XMP": chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="9"/>'),
}


@pytest.mark.parametrize("case", EXIF_OF_PNG)
def test_broken_exif_of_a_png_turns_nothing(case: str) -> None:
    assert corners(decoded(with_chunk(PNG, EXIF_OF_PNG[case]))) == KNOWN


def test_sixteen_bits_become_the_nearest_eight() -> None:
    """Every one of the 65,536 values: v / 257 rounded."""
    values_HW = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    pixels_CHW = decoded(encoded(Image.fromarray(values_HW)), ImageConfig(size=256))
    np.testing.assert_array_equal(pixels_CHW[1].numpy(), np.round(values_HW / 257))


# ------------------------------------------------------------------------------------------------- what is refused

LONG_TEXT = b"k\0\0" + zeros(100_000_000)
DAMAGED = "input[3]: the picture is truncated or damaged"
OTHER = "input[3]: not JPEG, PNG, WebP, GIF or BMP"
PIXELS = "image_too_large_pixels"
FORMAT = "unsupported_image_format"
REFUSED: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "invalid_image", "input[3]: the picture is empty"),
    "png bomb": (
        png(50_000, 50_000, rows=zeros(6251 * 50_000)),
        PIXELS,
        "input[3]: has too many pixels to decode",
    ),
    "png of two sides of 2^31": (
        png(2**31 - 1, 2**31 - 1),
        PIXELS,
        "input[3]: has too many pixels to decode",
    ),
    "jpeg of 65,535 x 65,535": (
        jpeg_of_size(65_535, 65_535),
        PIXELS,
        "input[3]: has too many pixels to decode",
    ),
    "webp of 16,383 x 16,383": (
        webp_of_size(16_383, 16_383),
        PIXELS,
        "input[3]: has too many pixels to decode",
    ),
    "bmp of 2^31": (bmp_of_size(2**31 - 1, 1), PIXELS, "input[3]: has too many pixels to decode"),
    "gif whose frame is larger than itself": (
        gif_with_frame(60_000, 60_000),
        PIXELS,
        "input[3]: has too many pixels to decode",
    ),
    "under Pillow's limit, over ours": (
        png(10_000, 10_000),
        PIXELS,
        "input[3]: has too many pixels to decode",
    ),
    "a row too many": (
        png(1000, 1001, rows=zeros(126 * 1001)),
        PIXELS,
        "input[3]: has 1000 x 1001 pixels, more than the allowed 1,000,000",
    ),
    "a side too long": (
        png(16_385, 1, rows=zeros(2050)),
        PIXELS,
        "input[3]: has 16385 x 1 pixels, a side of more than the allowed 16,384",
    ),
    "no width": (png(0, 5), "invalid_image", DAMAGED),
    "no height in a jpeg": (jpeg_of_size(48, 0), "invalid_image", DAMAGED),
    "zlib bomb in iCCP": (with_chunk(PNG, chunk(b"iCCP", LONG_TEXT)), "invalid_image", DAMAGED),
    "zlib bomb in zTXt": (with_chunk(PNG, chunk(b"zTXt", LONG_TEXT)), "invalid_image", DAMAGED),
    "zlib bomb in iTXt": (
        with_chunk(PNG, chunk(b"iTXt", b"k\0\1\0\0\0" + zeros(100_000_000))),
        "invalid_image",
        DAMAGED,
    ),
    "many texts of a megabyte": (
        with_chunk(PNG, *[chunk(b"zTXt", b"%d\0\0" % place + zeros(2**20 - 1)) for place in range(5)]),
        "invalid_image",
        DAMAGED,
    ),
    "many chunks": (
        with_chunk(PNG, chunk(b"prVt", b"") * MOST_SEGMENTS),
        "invalid_image",
        "input[3]: the PNG has more than 10,000 chunks",
    ),
    "many scans": (
        jpeg_of_many_scans(MOST_SCANS + 1),
        "invalid_image",
        "input[3]: the JPEG has more than 64 scans",
    ),
    "ten megabytes of scans": (
        jpeg_of_many_scans(150_000),
        "invalid_image",
        "input[3]: the JPEG has more than 64 scans",
    ),
    "many segments": (
        JPEG[:2] + b"\xff\xfe\0\2" * MOST_SEGMENTS + JPEG[2:],
        "invalid_image",
        "input[3]: the JPEG has more than 10,000 segments",
    ),
    "wrong checksum of the pixels": (
        bad_checksum(PNG, b"IDAT"),
        "invalid_image",
        "input[3]: a checksum of the PNG is wrong",
    ),
    "wrong checksum of the header": (
        bad_checksum(PNG, b"IHDR"),
        "invalid_image",
        "input[3]: a checksum of the PNG is wrong",
    ),
    "wrong checksum of a chunk that nobody needs": (
        with_chunk(PNG, chunk(b"prVt", b"?")[:-1] + b"!"),
        "invalid_image",
        "input[3]: a checksum of the PNG is wrong",
    ),
    "no end of the png": (PNG[:-12], "invalid_image", "input[3]: the PNG is truncated"),
    "signature of a png": (PNG[:8], "invalid_image", "input[3]: the PNG is truncated"),
    "start of a jpeg": (JPEG[:2], FORMAT, OTHER),
    "start of a jpeg and a byte": (JPEG[:3], "invalid_image", DAMAGED),
    "start and end of a jpeg": (b"\xff\xd8\xff\xd9", "invalid_image", DAMAGED),
    "twelve bits": (jpeg_of_twelve_bits(), "invalid_image", DAMAGED),
    "gif of nothing": (b"GIF89a" + bytes(20), "invalid_image", DAMAGED),
    "bitmap of nothing": (b"BM" + b"\xff" * 50, "invalid_image", DAMAGED),
    "bitmap of runs that end nowhere": (
        bmp_of_size(1000, 1000, compression=1, rows=b"\1\7" * 99),
        "invalid_image",
        DAMAGED,
    ),
    "a sentence that begins like a bitmap": (b"BMW makes cars", "invalid_image", DAMAGED),
    "webp of nothing": (b"RIFF\0\0\0\0WEBPVP8 ", "invalid_image", DAMAGED),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", FORMAT, OTHER),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), FORMAT, OTHER),
    "avif": (encoded(known(), "AVIF"), FORMAT, OTHER),
    "jpeg 2000": (encoded(known(), "JPEG2000"), FORMAT, OTHER),
    "icon": (encoded(known(), "ICO"), FORMAT, OTHER),
    "pdf": (b"%PDF-1.7\n" + JPEG, FORMAT, OTHER),
    "html": (b"<!doctype html><img src=x>", FORMAT, OTHER),
    "html with a picture in it": (b"<!doctype html>" + PNG, FORMAT, OTHER),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", FORMAT, OTHER),
    "archive": (b"PK\x03\x04" + PNG, FORMAT, OTHER),
    "wave": (b"RIFF\x24\0\0\0WAVEfmt ", FORMAT, OTHER),
    "tiff": (encoded(known(), "TIFF"), FORMAT, OTHER),
    "sixteen-bit tiff": (encoded(Image.new("I;16", (8, 8)), "TIFF"), FORMAT, OTHER),
    "float tiff": (encoded(Image.new("F", (8, 8)), "TIFF"), FORMAT, OTHER),
}


@pytest.mark.filterwarnings(
    "error::PIL.Image.DecompressionBombWarning"
)  # as `images` has it; pytest resets it
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    data, code, message = REFUSED[case]
    start = time.process_time()
    with pytest.raises(RequestError) as caught:
        decoded(data)
    error = caught.value
    assert (error.status, error.code, error.message, error.param) == (400, code, message, "input[3]")
    assert error.__suppress_context__ or error.__context__ is None  # Pillow's does not come along into a log
    assert time.process_time() - start < 1


CUT = {
    "png": PNG,
    "jpeg": JPEG,
    "jpeg progressive": encoded(known(), "JPEG", progressive=True, quality=95),
    "webp": encoded(known(), "WEBP", lossless=True),
    "gif": encoded(known(), "GIF"),
    "bmp": encoded(known(), "BMP"),
}


@pytest.mark.parametrize("kind", CUT)
def test_a_picture_cut_anywhere_is_refused_or_whole(kind: str) -> None:
    """What is missing may be the end mark, never pixels."""
    data = CUT[kind]
    whole, answers = decoded(data), set()
    for length in range(len(data)):
        try:
            pixels_CHW = decoded(data[:length])
        except RequestError as error:
            answers.add((error.status, error.code, error.message == OTHER))
        else:
            assert torch.equal(pixels_CHW, whole), f"{length} of {len(data)} bytes give another picture"
    assert answers == {(400, "invalid_image", False), (400, FORMAT, True)}
