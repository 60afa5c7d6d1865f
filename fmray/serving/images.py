"""From what a stranger calls a picture to uint8 pixels: `data:` URL, base64, size, format, cost, decoding.

B pictures  S side of the square
"""

from __future__ import annotations

import base64
import binascii
import re
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from fmray.config.schema import ImageConfig
from fmray.data.transforms import Fault, PictureError, compose, decode_picture, white
from fmray.errors import RequestError
from fmray.serving.picture_cost import JPEG_SIGNATURE, PNG_SIGNATURE, complaint_of, too_many_bytes

DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)?((?:;[^,;]*)*),", re.IGNORECASE)
"""`data:image/png;charset=x;base64,` — the media type and the parameters; what follows is the payload."""
LONGEST_HEAD = 200
"""Characters in which the comma of a `data:` URL must come."""
FORMATS = "JPEG, PNG, WebP, GIF or BMP"
SIGNATURES = (JPEG_SIGNATURE, PNG_SIGNATURE, b"GIF87a", b"GIF89a", b"BM")
LONGEST_SIDE = 16_384
"""Pixels of a picture's longer side; WebP can have 16,383."""

ESCAPES = {"%2b": "+", "%2f": "/", "%3d": "=", "%20": "", "%09": "", "%0a": "", "%0d": ""}
"""What of base64 clients percent-encode."""

CODES: dict[Fault, str] = {
    "empty": "invalid_image",
    "damaged": "invalid_image",
    "format": "invalid_image",  # it begins as one of the formats does, and is none: its header is damaged
    "pixels": "image_too_large_pixels",
}

# Compressed text in a PNG unpacks to 1 MiB each and 4 MiB together, then the picture is refused.
PngImagePlugin.MAX_TEXT_CHUNK = 2**20
PngImagePlugin.MAX_TEXT_MEMORY = 2**22
# Python remembers every text that was warned of: numbers in hostile headers would fill that memory, and the log.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def is_data_url(text: str) -> bool:
    """Whether a plain string is a `data:` URL rather than a sentence that starts with "data:"."""
    return DATA_URL.match(text, 0, LONGEST_HEAD) is not None


def image_bytes(url: str, name: str, *, max_bytes: int, fetched: Mapping[str, bytes] | None = None) -> bytes:
    """The encoded picture in a base64 `data:` URL, or what was fetched under this `name`.

    Newlines, the URL-safe alphabet, percent-encoded base64 and missing padding are accepted; a `data:` URL without
    `;base64` is not. The declared type is not believed: the bytes say what they are. Raises RequestError(400) with
    `param=name`.
    """
    if fetched is not None and name in fetched:
        return checked_picture(fetched[name], name)
    head = DATA_URL.match(url, 0, LONGEST_HEAD)
    if head is None:
        message = f"{name}: send the picture as data:image/png;base64,…; other URLs are not fetched"
        raise RequestError(400, "url_not_allowed", message, name)
    if not (head[1] or "image/").lower().startswith("image/"):
        raise RequestError(400, "unsupported_image_format", f"{name}: not an image; send {FORMATS}", name)
    if not head[2].lower().endswith(";base64"):
        raise RequestError(400, "invalid_image", f"{name}: the data: URL must be base64", name)
    return checked_picture(_decode_base64(url, head.end(), name, max_bytes), name)


def checked_picture(data: bytes, name: str) -> bytes:
    """The same bytes, which begin as a picture does; raises RequestError(400) where they do not."""
    if not data:
        raise RequestError(400, "invalid_image", f"{name}: the picture is empty", name)
    if not (data.startswith(SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
        raise RequestError(400, "unsupported_image_format", f"{name}: not {FORMATS}", name)
    return data


def _decode_base64(url: str, start: int, name: str, max_bytes: int) -> bytes:
    """What follows `start`. Its size is known before a byte is decoded."""
    payload = url[start:]
    if "%" in payload:
        for escape, letter in ESCAPES.items():
            payload = payload.replace(escape, letter).replace(escape.upper(), letter)
    try:
        raw = payload.encode("ascii").translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
        if len(raw) * 3 // 4 > max_bytes:
            raise too_many_bytes(name, max_bytes)
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise RequestError(400, "invalid_image", f"{name}: not valid base64", name) from None


# ----------------------------------------------------------------------------------------------------- pixels


def pixels_of_one(data: bytes, name: str, image: ImageConfig, *, max_pixels: int) -> Tensor:
    """An encoded picture as uint8 [3, S, S], transparent parts on white.

    As training decodes it, after checks of what the decoding will cost. Most of it runs without the interpreter's
    lock, so threads help. Raises RequestError(400) with `param=name`: not one of the formats, damaged, truncated, or
    more than `max_pixels` or a side over 16,384 by its header.
    """
    checked_picture(data, name)
    complaint = complaint_of(data)
    if complaint is not None:
        raise RequestError(400, "invalid_image", f"{name}: {complaint}", name)
    try:
        fitted = decode_picture(data, image, name=name, max_pixels=max_pixels, max_side=LONGEST_SIDE)
    except PictureError as error:  # `detail` is Pillow's own text, and stays here
        facts = "the picture is truncated or damaged" if error.fault == "format" else error.facts
        raise RequestError(400, CODES[error.fault], f"{name}: {facts}", name) from None
    pixels_CHW = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
    if fitted.mode == "RGBA":
        pixels_CHW = compose(pixels_CHW[None], white(1))[0]
    return pixels_CHW.contiguous()


def pixels_of(images: Sequence[tuple[bytes, str]], image: ImageConfig, *, max_pixels: int) -> Tensor | None:
    """Encoded pictures and their names to uint8 [B, 3, S, S] on white; None where there are none.

    Raises RequestError(400) with the name of the first picture that cannot be decoded.
    """
    if not images:
        return None
    return torch.stack([pixels_of_one(data, name, image, max_pixels=max_pixels) for data, name in images])
