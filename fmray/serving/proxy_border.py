"""Around Ray Serve's own proxy: no header of a stranger steers it, and its plain-text errors become OpenAI's.

Serve imports this where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=fmray.serving.proxy_border.middlewares` is in the
environment of every node before Serve starts; it wraps the Python proxy and, with HAProxy, each replica's own port.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fmray.errors import RequestError
from fmray.serving.border import DISCONNECT_HEADER, HANDED_ON, REQUEST_ID, TIMEOUT_HEADER, error_response

IMPORT_PATH = "fmray.serving.proxy_border.middlewares"
ANSWERS: Mapping[int, tuple[int, str, str]] = {
    404: (404, "not_found", "no such route"),
    408: (504, "deadline_exceeded", "the request was not answered within its time; try again later"),
    429: (429, "overloaded", "more requests wait than may wait; try again later"),
    503: (503, "unavailable", "no replica can answer just now; try again later"),
}
"""Serve's statuses, and what a client is told instead. Any other one, and no answer at all, is `LOST`."""
LOST = (503, "replica_lost", "the replica that worked on this request was lost; send it again")
"""Our routes answer every error of their own: what remains is a replica that died. Requests change nothing, so they may be
sent again."""


def middlewares() -> list[Middleware]:
    """What Serve calls."""
    return [Middleware(ProxyBorder)]


class ProxyBorder:
    """ASGI middleware. Serve's proxy obeys three headers of any client before the app sees them; here they are made harmless.

    `x-request-timeout-seconds` is handed on as a deadline for the app alone, which answers as documented when it is over;
    `x-request-disconnect-disabled` (a client that leaves would keep its model busy) is dropped; an `x-request-id` that is no
    plain word is replaced.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Serve's own health and routes
            return await self.app(scope, receive, send)
        scope = {**scope, "headers": _harmless(scope["headers"])}
        answer = _Answer(scope, send)
        await self.app(scope, receive, answer.send)
        await answer.finish()


class _Answer:
    """Passes on what the app says; replaces what Serve says."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._started, self._own = False, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = Headers(raw=[(bytes(name), bytes(value)) for name, value in message["headers"]])
            plain = headers.get("content-type", "").startswith("text/plain")
            self._own = message["status"] >= 400 and plain
            if self._own:
                await self._replace(message["status"], headers)
        if not self._own:
            await self._send(message)

    async def finish(self) -> None:
        """Serve answers nothing at all where a replica died: uvicorn would make a bare 500 of that."""
        if not self._started:
            await self._replace(500, Headers())

    async def _replace(self, status: int, said: Headers) -> None:
        to, code, message = ANSWERS.get(status, LOST)
        after = said.get("retry-after", "")
        wait = float(after) if after.isdecimal() else None
        response = error_response(RequestError(to, code, message, retry_after=wait))
        headers = MutableHeaders(raw=response.raw_headers)
        request_id = said.get("x-request-id") or Headers(scope=self._scope)["x-request-id"]
        headers["x-request-id"] = request_id
        if to >= 500:
            headers["x-should-retry"] = "true"
        response.raw_headers = headers.raw
        await response(self._scope, _nothing, self._send)


def _harmless(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    kept = [pair for pair in headers if pair[0] not in (DISCONNECT_HEADER, b"x-request-id")]
    asked = Headers(raw=headers).get("x-request-id", "")
    request_id = asked if REQUEST_ID.fullmatch(asked) else f"req_{uuid.uuid4().hex}"
    renamed = [(HANDED_ON if name == TIMEOUT_HEADER else name, value) for name, value in kept]
    return [*renamed, (b"x-request-id", request_id.encode())]


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
