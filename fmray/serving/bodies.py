"""A request's body: read up to a size, within a time, as JSON that is neither deep nor a crowd of tiny values."""

from __future__ import annotations

import asyncio

import numpy as np
from starlette.datastructures import Headers
from starlette.types import Receive

from fmray.errors import RequestError

DEEPEST = 64
"""Lists and objects within each other; the longest honest request has about eight."""
MOST_VALUES = 500_000
"""Values in one body. Of 20 MiB of empty lists Python's parser makes 370 MB and holds the event loop for over a second;
of as many values as this, for an eighth of one."""

_STRUCTURE = b'[]{},"'
_OTHERS = bytes(byte for byte in range(256) if byte not in _STRUCTURE)
_OPENERS, _CLOSERS = b"[{", b"]}"
_STEPS = np.zeros(256, np.int32)
_STEPS[list(_OPENERS)] = 1
_STEPS[list(_CLOSERS)] = -1


class BodyLeft(Exception):
    """The client left before its body was there."""


async def read_body(headers: Headers, receive: Receive, *, limit: int, seconds: float) -> bytes:
    """The whole body, checked while it arrives; at most `limit` bytes and one chunk are ever held.

    Raises RequestError: 413 at the first byte over the limit, 408 where it takes longer than `seconds`, 400 where it is
    not UTF-8 or too deep or too many values; and BodyLeft. Whether it is JSON is found by whoever parses it.
    """
    too_large = RequestError(413, "request_too_large", f"the body has more than {limit / 2**20:.0f} MiB")
    declared = headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise too_large
    chunks: list[bytes] = []
    shape, size, more = JsonShape(), 0, True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise BodyLeft
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise too_large
                shape.feed(chunk)
                chunks.append(chunk)
                more = message.get("more_body", False)
    except TimeoutError:
        message_ = f"the body was not there within {seconds:g} s"
        raise RequestError(408, "body_timeout", message_) from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class JsonShape:
    """Counts depth and values of JSON that comes in chunks, in linear time (4 ms for 20 MiB of base64).

    Exact for as much of a text as is JSON. From the first fault on it may be wrong, and the parser does not get there.
    """

    def __init__(self) -> None:
        self.depth, self.values = 0, 0
        self._in_string, self._escaped, self._start = False, False, b""

    def feed(self, chunk: bytes) -> None:
        """The next bytes; raises RequestError(400)."""
        if len(self._start) < 4:
            self._start += chunk[:4]
        # Python's parser also takes UTF-16 and UTF-32, in whose characters this scan would see quotes that are none
        if b"\0" in chunk or self._start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise RequestError(400, "invalid_json", "the body is not valid JSON: send UTF-8")
        for start in range(0, len(chunk), 2**16):  # small pieces keep what is copied in the processor's cache
            self._feed(chunk[start : start + 2**16])

    def _feed(self, piece: bytes) -> None:
        if self._escaped:
            piece, self._escaped = piece[1:], False
        if b"\\" in piece:
            if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
                piece, self._escaped = piece[:-1], True
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.translate(None, _OTHERS).split(b'"')
        outside = b"".join(parts[1 if self._in_string else 0 :: 2])
        self._in_string ^= len(parts) % 2 == 0
        if outside:
            self._count(outside)

    def _count(self, outside: bytes) -> None:
        opened = sum(outside.count(byte) for byte in (b"[", b"{"))
        self.values += opened + outside.count(b",")
        if self.values > MOST_VALUES:
            raise RequestError(400, "invalid_request", f"the body has more than {MOST_VALUES} values")
        if self.depth + opened <= DEEPEST:  # nearly always
            self.depth += opened - sum(outside.count(byte) for byte in (b"]", b"}"))
            return
        heights = self.depth + np.cumsum(_STEPS[np.frombuffer(outside, np.uint8)])
        if heights.max() > DEEPEST:
            raise RequestError(400, "invalid_request", f"the body is nested deeper than {DEEPEST}")
        self.depth = int(heights[-1])
