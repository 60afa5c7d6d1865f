"""Pictures as strangers send them, made byte by byte: a known one in every guise, and bombs, cuts and forgeries."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
"""Top left, top right, bottom left, bottom right of the known picture: no turn and no mirror leaves it as it is."""


def known(width: int = 48, height: int = 32) -> Image.Image:
    """Four plain quarters."""
    picture = Image.new("RGB", (width, height))
    for place, color in enumerate(CORNERS):
        left, top = place % 2 * width // 2, place // 2 * height // 2
        picture.paste(color, (left, top, left + width // 2, top + height // 2))
    return picture


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------ PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, bits: int = 1, color: int = 0, rows: bytes = b"") -> bytes:
    """Any header, any chunks before the pixels; `rows` are deflated already."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return SIGNATURE + header + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """That many zero bytes, deflated, without making them."""
    packer, block = zlib.compressobj(9), bytes(2**20)
    parts = [packer.compress(block) for _ in range(count // 2**20)]
    return b"".join(parts) + packer.compress(bytes(count % 2**20)) + packer.flush()


def with_chunk(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def bad_checksum(data: bytes, kind: bytes) -> bytes:
    """A PNG whose chunk of this kind has a wrong checksum; all else is sound."""
    start = data.index(kind)
    end = start + 4 + int.from_bytes(data[start - 4 : start], "big")
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


# ----------------------------------------------------------------------------------------------------------- JPEG


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG that claims any size up to 65,535."""
    data = bytearray(encoded(known(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_twelve_bits() -> bytes:
    data = bytearray(encoded(known(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 1], data[start + 4] = 0xC1, 12
    return bytes(data)


def jpeg_of_many_scans(scans: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan is said again and again."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"


def ycck(picture: Image.Image) -> bytes:
    """A JPEG of luma, chroma and black, as Photoshop writes: Pillow's CMYK file, marked as such a one.

    A decoder turns its first three channels from YCC to RGB, which are then the inverse of cyan, magenta and yellow.
    """
    ycc = Image.eval(picture, lambda value: 255 - value).convert("YCbCr")
    channels = [Image.eval(band, lambda value: 255 - value) for band in ycc.split()]
    data = bytearray(
        encoded(Image.merge("CMYK", [*channels, Image.new("L", picture.size)]), "JPEG", quality=98)
    )
    start = data.index(b"Adobe")
    data[start + 11] = 2
    return bytes(data)


def turned(orientation: int, picture: Image.Image) -> Image.Image:
    """How a camera that was held this way stores a picture: EXIF 2.32, 4.6.4."""
    pixels_HWC = np.asarray(picture)
    stored: dict[int, NDArray[np.uint8]] = {
        1: pixels_HWC,
        2: pixels_HWC[:, ::-1],
        3: pixels_HWC[::-1, ::-1],
        4: pixels_HWC[::-1],
        5: pixels_HWC.transpose(1, 0, 2),
        6: pixels_HWC.transpose(1, 0, 2)[::-1],
        7: pixels_HWC[::-1, ::-1].transpose(1, 0, 2),
        8: pixels_HWC.transpose(1, 0, 2)[:, ::-1],
    }
    return Image.fromarray(np.ascontiguousarray(stored[orientation]))


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def tiff_tags(*entries: tuple[int, int, int, bytes], count: int | None = None, after: int = 0) -> bytes:
    """EXIF with one directory: entries of (tag, type, count, 4 bytes); `count` may lie about them."""
    rows = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    number = len(entries) if count is None else count
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", number) + rows + struct.pack("<I", after)


# ---------------------------------------------------------------------------------------------------- GIF and BMP


def gif_with_frame(width: int, height: int) -> bytes:
    """A GIF of 8 x 8 whose frame claims another size."""
    data = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    start = data.rindex(b",", 0, len(data) - 4)
    data[start + 5 : start + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_of_size(width: int, height: int, *, compression: int = 0, rows: bytes = b"") -> bytes:
    """An 8-bit bitmap that claims any size; compression 1 is run-length."""
    start = 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + bytes(1024) + rows


def webp_of_size(width: int, height: int) -> bytes:
    """A lossless WebP that claims any size up to 16,384."""
    data = bytearray(encoded(known(), "WEBP", lossless=True))
    start = data.index(b"VP8L") + 9
    (bits,) = struct.unpack_from("<I", data, start)
    struct.pack_into("<I", data, start, bits & 0xF0000000 | (height - 1) << 14 | (width - 1))
    return bytes(data)
