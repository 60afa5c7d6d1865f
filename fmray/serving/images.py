"""From what a stranger calls a picture to uint8 pixels: `data:` URL, base64, size, format, decoding.

B pictures  S side of the square  (4 channels: red, green, blue, alpha)
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

import torch
from torch import Tensor

from fmray.config.schema import ImageConfig
from fmray.data.transforms import compose, decode_rgba, white
from fmray.errors import DataError, RequestError

DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)?((?:;[^,;]*)*),", re.IGNORECASE)
"""`data:image/png;charset=x;base64,` — the media type and the parameters; what follows is the payload."""
LONGEST_HEAD = 200
"""Characters in which the comma of a `data:` URL must come."""
FORMATS = "JPEG, PNG, WebP, GIF or BMP"
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")


def is_data_url(text: str) -> bool:
    """Whether a plain string is a `data:` URL rather than a sentence that starts with "data:"."""
    return DATA_URL.match(text, 0, LONGEST_HEAD) is not None


def image_bytes(url: str, name: str, *, max_bytes: int) -> bytes:
    """The encoded picture in a base64 `data:` URL. Raises RequestError(400) with `param=name`.

    Newlines, the URL-safe alphabet and missing padding are accepted. The declared type is not believed: the
    bytes say what they are.
    """
    head = DATA_URL.match(url, 0, LONGEST_HEAD)
    if head is None:
        message = f"{name}: send the picture as data:image/png;base64,…; other URLs are not fetched"
        raise RequestError(400, "url_not_allowed", message, name)
    if not (head[1] or "image/").lower().startswith("image/"):
        raise RequestError(400, "unsupported_image_format", f"{name}: not an image; send {FORMATS}", name)
    if not head[2].lower().endswith(";base64"):
        raise RequestError(400, "invalid_image", f"{name}: the data: URL must be base64", name)
    data = _decode_base64(url[head.end() :], name, max_bytes)
    if not data:
        raise RequestError(400, "invalid_image", f"{name}: the picture is empty", name)
    if not (data.startswith(SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
        raise RequestError(400, "unsupported_image_format", f"{name}: not {FORMATS}", name)
    return data


def _decode_base64(payload: str, name: str, max_bytes: int) -> bytes:
    try:
        raw = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        raw = raw.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n=")
        if len(raw) * 3 // 4 > max_bytes:  # known before a byte is decoded
            limit = f"{max_bytes / 2**20:.0f} MiB"
            raise RequestError(400, "image_too_large", f"{name}: the picture has more than {limit}", name)
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise RequestError(400, "invalid_image", f"{name}: not valid base64", name) from None


def pixels_of(images: Sequence[tuple[bytes, str]], image: ImageConfig, *, max_pixels: int) -> Tensor | None:
    """Encoded pictures and their names to uint8 [B, 3, S, S] on white; None where there are none.

    Raises RequestError(400) with the name of the first picture that cannot be decoded.
    """
    if not images:
        return None
    rgba = []
    for data, name in images:
        try:
            rgba.append(decode_rgba(data, image, name=name, max_pixels=max_pixels))
        except DataError as error:
            message = str(error).split(" (")[
                0
            ]  # what stands in brackets is Pillow's own text, and may hold an address
            code = "image_too_large_pixels" if " pixels" in message else "invalid_image"
            raise RequestError(400, code, message, name) from None
    return compose(torch.stack(rgba), white(len(rgba)))
