"""An app behind the real border and a real uvicorn, with routes that are slow, that stream and that fail; and raw sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from fmray.errors import RequestError
from fmray.runtime.ports import free_port
from fmray.serving.border import Border, install_error_answers
from fmray.serving.connections import uvicorn_settings
from fmray.serving.rate_limits import charge

SECRET = "a prompt that nobody may read"


class Body(BaseModel):
    """Anything with a text."""

    text: str = ""
    number: float = 0.0
    inputs: list[Any] = []


class Seen:
    """What the routes have noticed."""

    def __init__(self) -> None:
        self.cancelled, self.finished, self.streamed = 0, 0, 0
        self.headers: dict[str, str] = {}
        self.deadline = 0.0


def border_app(**options: Any) -> tuple[FastAPI, Seen]:
    """The app and what it has seen; `options` are the border's."""
    app, seen = FastAPI(redirect_slashes=False), Seen()
    app.add_middleware(Border, **{"max_body": 2**20, **options})
    install_error_answers(app)

    @app.get("/health")
    @app.get("/ready")
    @app.get("/page/app.js")
    @app.get("/metrics")
    @app.get("/v1/models")
    async def fine() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/echo")
    async def echo(request: Request, body: Body) -> dict[str, Any]:
        await charge(request, len(body.inputs))
        seen.headers = dict(request.headers)
        seen.deadline = request.scope["state"]["deadline"] - asyncio.get_running_loop().time()
        request.scope["state"].update(queue_seconds=0.0015, infer_seconds=0.25)
        return {"text": body.text, "key": request.scope["state"]["key_name"]}

    @app.post("/v1/slow")
    async def slow(body: Body) -> dict[str, str]:
        try:
            await asyncio.sleep(body.number)
        except asyncio.CancelledError:
            seen.cancelled += 1
            raise
        seen.finished += 1
        return {"text": body.text}

    @app.post("/v1/stream")
    async def stream(body: Body) -> StreamingResponse:
        async def words() -> AsyncIterator[str]:
            try:
                for i in range(int(body.number)):
                    yield f"data: {i}\n\n"
                    seen.streamed += 1
                    await asyncio.sleep(0.02)
                    if body.text == "break":
                        raise RuntimeError(SECRET)
            except asyncio.CancelledError:
                seen.cancelled += 1
                raise

        return StreamingResponse(words(), media_type="text/event-stream")

    @app.post("/v1/fail/{kind}")
    async def fail(kind: str, body: Body) -> None:
        if kind == "request":
            raise RequestError(400, "invalid_value", "no")
        raise {"value": ValueError, "key": KeyError, "runtime": RuntimeError}[kind](f"{SECRET} {body.text}")

    return app, seen


@contextmanager
def running(app: Any, protocol: Any = None) -> Iterator[int]:
    """The port of a real uvicorn with our protocol."""
    port = free_port()
    options = {**uvicorn_settings(), **({} if protocol is None else {"http": protocol})}
    config = uvicorn.Config(app, port=port, log_config=None, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", port), timeout=10)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return raw


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    """A request as it goes over the wire."""
    lines = [f"POST {path} HTTP/{version}", "host: x", "content-type: application/json", *headers]
    if not any(line.startswith("content-length") for line in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def read_reply(raw: socket.socket, left: bytes = b"") -> tuple[int, dict[str, str], bytes, bytes]:
    """Status, headers, body of one answer with a length, and what came after it."""
    while b"\r\n\r\n" not in left:
        part = raw.recv(65536)
        assert part, left
        left += part
    head, _, left = left.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    length = int(headers.get("content-length", "0"))
    while len(left) < length:
        part = raw.recv(65536)
        assert part, left
        left += part
    return int(lines[0].split()[1]), headers, left[:length], left[length:]


def ask(port: int, request: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    """One request on a connection of its own."""
    with connect(port) as raw:
        raw.sendall(request)
        status, headers, body, _ = read_reply(raw)
    return status, headers, json.loads(body)


def until(condition: Any, seconds: float = 5.0) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())
