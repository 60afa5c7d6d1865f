"""What a connection may do before there is a request: uvicorn's protocol with bounds on a request's head, errors as JSON."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import Any

from fmray.serving.schemas import ErrorFacts, ErrorReply

MOST_HEAD = 32 * 2**10
"""Bytes of a request line and its headers. httptools, which uvicorn takes where it is installed, has no bound of its own;
h11 bounds what it has to keep: the same number and one read."""
HEAD_SECONDS = 20.0
"""In which the first request's head has to be there; later ones have uvicorn's keep-alive time."""
STALL_SECONDS = 60.0
"""In which somebody who reads slowly has to have taken what waits for him, some 64 KiB beside the system's own buffers."""
MOST_LEFT_OVER = 64 * 2**20
"""Bytes of a refused body that are still read, so that a client which sends first and reads then gets to see its answer."""

_REFUSALS = {
    400: ("Bad Request", "invalid_http", "this is not HTTP that can be read"),
    431: (
        "Request Header Fields Too Large",
        "headers_too_large",
        f"the headers have more than {MOST_HEAD // 1024} KiB",
    ),
}


def refusal(status: int) -> bytes:
    """A whole HTTP/1.1 answer, after which the connection is closed; for what never becomes a request."""
    reason, code, message = _REFUSALS[status]
    facts = ErrorFacts(message=message, type="invalid_request_error", param=None, code=code)
    body = ErrorReply(error=facts).model_dump_json().encode()
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


def uvicorn_settings() -> dict[str, Any]:
    """Arguments for `uvicorn.Config`: our protocol over httptools, or over h11 where there is no httptools.

    No access log, which would hold paths and queries; no websockets; no forwarded header is believed, which uvicorn does of
    whoever connects from this machine; and no word of what serves.
    """
    protocol = _bounded_h11() if find_spec("httptools") is None else _bounded_httptools()
    return {
        "http": protocol,
        "h11_max_incomplete_event_size": MOST_HEAD,
        "ws": "none",
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
    }


class _Impatient:
    """Ends a connection whose client asks and does not read: uvicorn would hold the answer, and a stream's model, for ever."""

    _stalled: asyncio.TimerHandle | None = None
    transport: asyncio.Transport

    def pause_writing(self) -> None:
        """The buffer is full."""
        super().pause_writing()  # type: ignore[misc]
        self._stalled = asyncio.get_running_loop().call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It is empty enough again."""
        super().resume_writing()  # type: ignore[misc]
        if self._stalled is not None:
            self._stalled.cancel()


def _bounded_h11() -> type[Any]:
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class BoundedH11(_Impatient, H11Protocol):  # type: ignore[misc]
        """h11 counts what it keeps itself."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            _begin(self, transport)

        def send_400_response(self, msg: str) -> None:
            self.transport.write(refusal(400))
            self.transport.close()

    return BoundedH11


def _bounded_httptools() -> type[Any]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class BoundedHttpTools(_Impatient, HttpToolsProtocol):  # type: ignore[misc]
        """Counts what arrives between a request's first byte and its last header."""

        _in_head, _head, _seen, _left_over = True, 0, 0, 0

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            _begin(self, transport)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_head and self.parser is not None and not self.transport.is_closing():
                self._head += len(data)
                if self._head > MOST_HEAD:
                    self.send_400_response("")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head, self._head, self._seen = True, 0, 0

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            self._see(len(url))

        def on_header(self, name: bytes, value: bytes) -> None:
            self._see(len(name) + len(value) + 4)
            if self._in_head:  # trailers are read and forgotten
                super().on_header(name, value)

        def _see(self, size: int) -> None:
            """Of a head that came in one piece."""
            self._seen += size
            if self._seen > MOST_HEAD:
                self._head = self._seen
                raise ValueError(
                    "the head is too large"
                )  # the parser ends: uvicorn answers send_400_response

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            if self.cycle.response_complete:
                self._left_over += len(body)
                if self._left_over > MOST_LEFT_OVER:
                    self.transport.close()

        def send_400_response(self, msg: str) -> None:
            if not self.transport.is_closing():
                self.transport.write(refusal(431 if self._head > MOST_HEAD else 400))
                self.transport.close()

    return BoundedHttpTools


def _begin(protocol: Any, transport: asyncio.Transport) -> None:
    """A connection that never sends a whole head is closed; uvicorn would keep it for ever."""
    protocol.access_log = False  # uvicorn asks only whether somebody, anybody, has a handler that hears it

    def look() -> None:
        if protocol.cycle is None and not transport.is_closing():
            transport.close()

    asyncio.get_running_loop().call_later(HEAD_SECONDS, look)
