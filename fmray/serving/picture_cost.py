"""What a picture's bytes would cost to decode beyond its pixels: a JPEG's scans, a PNG's chunks, its checksums.

A decoder that is limited by pixels alone is not limited in time: 40 megapixels of progressive JPEG take 15 ms for each
further scan of 60 bytes, which makes three quarters of an hour of 10 MiB.
"""

from __future__ import annotations

import re
import struct
import zlib

from fmray.errors import RequestError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

MOST_SCANS = 64
"""A progressive JPEG has about ten."""
MOST_SEGMENTS = 10_000
"""Segments of a JPEG or chunks of a PNG: 10 MiB in chunks of 8 KiB are 1,280."""

_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""Where libjpeg finds the next segment: neither a stuffed zero, nor a fill byte, nor a restart within a scan."""
_SCAN, _END, _ALONE = 0xDA, 0xD9, (0x01, 0xD8)


def too_many_bytes(name: str, max_bytes: int) -> RequestError:
    """`input[0]: the picture has more than 10 MiB`"""
    message = f"{name}: the picture has more than {size_in_words(max_bytes)}"
    return RequestError(400, "image_too_large", message, name)


def size_in_words(count: int) -> str:
    """`10 MiB`, or `2,048 bytes` below one."""
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count:,} bytes"


def complaint_of(data: bytes) -> str | None:
    """What is wrong with an encoded picture's structure, or None. Reads every byte at most once, decodes none."""
    if data.startswith(JPEG_SIGNATURE):
        return _complaint_of_jpeg(data)
    if data.startswith(PNG_SIGNATURE):
        return _complaint_of_png(data)
    return None  # GIF, WebP and BMP cost what their pixels and bytes cost


def _complaint_of_jpeg(data: bytes) -> str | None:
    position, scans = 2, 0
    for _ in range(MOST_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None or (kind := found[1][0]) == _END:
            return None  # a missing end is the decoder's to judge; behind the end nothing is read
        position = found.end()
        scans += kind == _SCAN
        if scans > MOST_SCANS:
            return f"the JPEG has more than {MOST_SCANS} scans"
        if kind not in _ALONE:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return f"the JPEG has more than {MOST_SEGMENTS:,} segments"


def _complaint_of_png(data: bytes) -> str | None:
    """Chunks to the last one and their checksums; Pillow reads on where those of the pixels are wrong."""
    position = len(PNG_SIGNATURE)
    for _ in range(MOST_SEGMENTS):
        if position + 12 > len(data):
            return "the PNG is truncated"
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            return "the PNG is truncated"
        if zlib.crc32(memoryview(data)[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return "a checksum of the PNG is wrong"
        if kind == b"IEND":
            return None
        position = end + 4
    return f"the PNG has more than {MOST_SEGMENTS:,} chunks"
