"""The endpoint's border: who asks, how much, by when; bodies read within limits; errors as OpenAI's clients expect them."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fmray.errors import RequestError
from fmray.serving.bodies import BodyLeft, read_body
from fmray.serving.finished import Finished, Stage, begin_stages
from fmray.serving.keys import Access
from fmray.serving.rate_limits import RateLimits
from fmray.serving.schemas import ErrorFacts, ErrorReply

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""A client's own id is echoed where it looks like this: nothing is smuggled into a header or a log."""

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
"""Types of their own; else `invalid_request_error` below 500 and `server_error` from there on."""

ROUTE_ERRORS = {
    404: ("not_found", "no such route"),
    405: ("method_not_allowed", "this route does not take this method"),
}


# ----------------------------------------------------------------------------------------------------- errors


def install_error_answers(app: FastAPI) -> None:
    """What routes raise becomes `{"error": {message, type, param, code}}`; what nobody foresaw is left to `Border`."""
    for kind in (RequestError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer_error)


async def _answer_error(_request: Request, error: Exception) -> Response:
    """Where an exception of a route becomes a status code."""
    headers: Mapping[str, str] = {}
    if isinstance(error, RequestValidationError):
        error = _from_validation(error)
    elif isinstance(error, HTTPException):
        headers = error.headers or {}
        code, message = ROUTE_ERRORS.get(error.status_code, ("invalid_request", "the request cannot be read"))
        error = RequestError(error.status_code, code, message)
    assert isinstance(error, RequestError), type(error)
    return error_response(error, headers)


def error_type(status: int) -> str:
    """OpenAI's type of a status."""
    return ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that cannot be answered, with the headers that OpenAI's clients act on.

    A 429, 503 or 504 says when to come back: after the error's `retry_after` seconds where it has them, else after one.
    """
    facts = ErrorFacts(
        message=error.message, type=error_type(error.status), param=error.param, code=error.code
    )
    told = dict(headers or {})
    if error.status in (429, 503, 504):
        wait = 1.0 if error.retry_after is None else max(0.001, error.retry_after)
        told["retry-after"] = str(math.ceil(wait))
        told["retry-after-ms"] = str(math.ceil(wait * 1000))
    elif error.status == 401:
        told["www-authenticate"] = 'Bearer realm="fmray"'
    elif error.status == 408:
        told["connection"] = "close"  # the rest of a body that came too late is nobody's next request
    elif error.status == 500:
        told["x-should-retry"] = "false"  # models are deterministic: the same request would fail again
    body = ErrorReply(error=facts).model_dump_json()
    return Response(body, error.status, told, media_type="application/json")


def _from_validation(error: RequestValidationError) -> RequestError:
    """The first thing that pydantic found wrong, with `param` like `input[3]`."""
    first: dict[str, Any] = error.errors()[0]
    if first["type"] == "json_invalid":
        return RequestError(400, "invalid_json", "the body is not valid JSON")
    where = list(
        first["loc"][1:]
    )  # after "body": the field, then positions, between them names of union members
    if not where:
        return RequestError(400, "invalid_json", "the body must be a JSON object")
    if where[0] == "messages":
        param = _path(where)
    else:
        position = next((f"[{part}]" for part in where[1:] if isinstance(part, int)), "")
        param = f"{where[0]}{position}"
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return RequestError(400, code, f"{param}: {first['msg']}", param)


def _path(where: list[str | int]) -> str:
    """`messages[2].content[1]`: the message, its field, the part; what pydantic has found inside a part is not told."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in where[1:4]]
    return f"{where[0]}{''.join(steps)}"


# ----------------------------------------------------------------------------------------- around every route

OPEN_PATHS = ("/", "/health", "/ready")
OPEN_FOLDER = "/page/"
"""What needs no key and counts towards no limit: liveness, readiness, the page's own files. Everything else does."""

TIMEOUT_HEADER, DISCONNECT_HEADER = b"x-request-timeout-seconds", b"x-request-disconnect-disabled"
"""By these a client talks to Ray Serve's proxy rather than to us. The first we honour, within bounds; the second never."""
HANDED_ON = b"x-fmray-timeout-seconds"
"""What `proxy_border` makes of the first, so that Serve does not see it and we do."""
STRIPPED = (TIMEOUT_HEADER, DISCONNECT_HEADER, HANDED_ON)
"""Nothing behind the border sees them."""
SHORTEST = 0.1
LATE = 0.25
"""Seconds after a deadline in which whoever does the work may still say so himself, before the border does."""


@dataclass(slots=True)
class _Visit:
    """One request on its way through the border."""

    scope: Scope
    send: Send
    request_id: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    """Of the answer that has begun."""
    began: float = 0.0
    """When, by `time.perf_counter`."""
    stages: list[Stage] = field(default_factory=begin_stages)
    ended: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, message: Message) -> None:
        """The app's `send`: adds headers, and notes how far the answer is."""
        if message["type"] == "http.response.start":
            self.status, self.began = message["status"], time.perf_counter()
            self._add_headers(MutableHeaders(scope=message))
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self.send(message)

    def _add_headers(self, headers: MutableHeaders) -> None:
        state = self.scope["state"]
        headers["x-request-id"] = self.request_id
        headers["openai-processing-ms"] = str(round((time.monotonic() - self.started) * 1000))
        for name, key in (("x-queue-ms", "queue_seconds"), ("x-inference-ms", "infer_seconds")):
            if key in state:
                headers[name] = f"{state[key] * 1000:.1f}"
        if "caller" in state:
            headers.update(state["caller"].headers)

    async def refuse(self, error: RequestError) -> None:
        """Answer with an error."""
        await error_response(error)(self.scope, _nothing, self.answer)


class Border:
    """ASGI middleware around the whole app. In order: an id, the key, its rate, the body, the app under a deadline.

    Puts into `scope["state"]`: `request_id`, `key_name` (`-` without keys), `caller` (what `rate_limits.charge` asks) and
    `deadline` (seconds, of the loop's clock). Writes headers from `queue_seconds` and `infer_seconds` if it finds them
    there. The app runs in a task of its own: it is cancelled when its client leaves or its time is over, and what it
    raises ends here and not in a log that would print a prompt.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body: int,
        access: Access | None = None,
        limits: RateLimits | None = None,
        deadline_seconds: float = 60.0,
        body_seconds: float = 60.0,
        address_header: str | None = None,
        most_inside: int | None = None,
        crowded: Callable[[], None] | None = None,
        finished: Callable[[Finished], None] | None = None,
    ) -> None:
        self.app, self.max_body, self.access, self.limits = app, max_body, access, limits
        self.deadline_seconds, self.body_seconds = deadline_seconds, body_seconds
        self.address_header = address_header
        self.most_inside, self._inside = most_inside, 0
        self.crowded = crowded
        self.finished = finished

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # no route is one, and none shall be reached past the key
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # a copy: uvicorn appends the trailers of a chunked body
        headers = Headers(raw=list(scope["headers"]))
        kept = [pair for pair in headers.raw if pair[0] not in STRIPPED]
        # servers leave out the body themselves
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method, "headers": kept, "state": {**scope.get("state", {})}}
        asked = headers.get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else f"req_{uuid.uuid4().hex}"
        scope["state"].update(request_id=request_id, key_name="-")
        visit = _Visit(scope, send, request_id)
        # a prefix: what a page names is below its slash
        if scope["path"] and scope["path"] == scope.get("root_path"):
            headers_there = {"location": f"{scope['path']}/"}
            return await Response(status_code=307, headers=headers_there)(scope, _nothing, visit.answer)
        try:
            await self._answer(visit, headers, receive)
        finally:  # also of an answer that broke off, and of one that the server's end has cut short
            if self.finished is not None:
                self.finished(_finished(visit, headers))

    async def _answer(self, visit: _Visit, headers: Headers, receive: Receive) -> None:
        try:
            await self._admit(visit.scope, headers)
            _check_content_type(visit.scope["method"], headers)
            # before its body costs anything, and again as many bodies arrive at once
            self._check_room(visit.scope)
            body = await read_body(headers, receive, limit=self.max_body, seconds=self.body_seconds)
            self._check_room(visit.scope)
        except RequestError as error:
            await visit.refuse(error)
        except BodyLeft:
            pass
        else:
            self._inside += 1
            try:
                await self._run(visit, body, receive)
            finally:
                self._inside -= 1

    def _check_room(self, scope: Scope) -> None:
        """Raises RequestError(429) where so many requests are inside that a queue behind them would have no room for this one.

        Refused here a request costs a tenth of what it costs once it is parsed: the event loop keeps up with several times what
        the model can answer, and nothing piles up in front of the queues that are bounded.
        """
        if scope["method"] == "POST" and self.most_inside is not None and self._inside >= self.most_inside:
            if self.crowded is not None:
                self.crowded()
            message = f"{self._inside} requests are being answered and no more may wait; try again later"
            raise RequestError(429, "overloaded", message)

    async def _admit(self, scope: Scope, headers: Headers) -> None:
        """Key, rate and deadline; raises RequestError."""
        told = headers.get(HANDED_ON.decode()) or headers.get(TIMEOUT_HEADER.decode(), "")
        asked = _seconds(told, self.deadline_seconds)
        scope["state"]["deadline"] = asyncio.get_running_loop().time() + asked
        path = _route_path(scope)
        if scope["method"] == "GET" and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER)):
            return
        holder = None if self.access is None else self.access.holder(headers.getlist("authorization"))
        if holder is not None:
            scope["state"]["key_name"] = holder.name
        if self.limits is not None:
            address = _address(scope, headers, self.address_header)
            scope["state"]["caller"] = caller = self.limits.caller(holder, address)
            await caller.charge("requests", 1)

    async def _run(self, visit: _Visit, body: bytes, receive: Receive) -> None:
        """The app, until it has answered, its client has left, or its time is over."""
        replayed = False

        async def receive_body() -> Message:
            nonlocal replayed
            if replayed:
                await visit.left.wait()
                return {"type": "http.disconnect"}
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        work = asyncio.ensure_future(self.app(visit.scope, receive_body, visit.answer))
        watch = asyncio.ensure_future(_until_left(receive, visit))
        try:
            time_left = visit.scope["state"]["deadline"] + LATE - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait(
                (work, watch), timeout=time_left, return_when=asyncio.FIRST_COMPLETED
            )
            late = not done and not visit.status
            if not done and not late:  # an answer that has begun in time may go on
                await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:  # also where the server cancels this request: the work ends with it
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
        if late:
            message = "the request was not answered within its time; send less, or try again later"
            await visit.refuse(RequestError(504, "deadline_exceeded", message))
        elif not visit.left.is_set() and not work.cancelled() and (error := work.exception()) is not None:
            await _settle(visit, error)


async def _settle(visit: _Visit, error: BaseException) -> None:
    """The answer to a request on which the app failed."""
    _log_failure(visit.request_id, error)
    if not visit.status:
        message = "the server failed on this request; its log has the request id"
        await visit.refuse(RequestError(500, "internal_error", message))
    elif not visit.ended:  # half an answer is out: only a closed connection says that it is not whole
        raise RuntimeError(f"request {visit.request_id}: the answer broke off") from None


def _log_failure(request_id: str, error: BaseException) -> None:
    """Where it happened and of what kind; not its text, which may quote the request."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    logger.error("request %s failed with %s\n%s", request_id, type(error).__name__, frames)


async def _until_left(receive: Receive, visit: _Visit) -> None:
    """Returns once the client has left; servers also say so when the answer is complete, which is nothing to act on."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not visit.ended:
        visit.left.set()
    else:
        await asyncio.Event().wait()


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


# ------------------------------------------------------------------------------------------ what a request says


def _check_content_type(method: str, headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and kind != "application/json":
        raise RequestError(415, "unsupported_media_type", "send JSON with content-type: application/json")


def _seconds(asked: str, longest: float) -> float:
    """What a client asks for, between `SHORTEST` and `longest`; `longest` where it is no number (NaN among them)."""
    try:
        seconds = float(asked)
    except ValueError:
        return longest
    return longest if math.isnan(seconds) else min(max(seconds, min(SHORTEST, longest)), longest)


def _route_path(scope: Scope) -> str:
    """The path as the router sees it: below the prefix under which Ray Serve has put the app."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    below = path.removeprefix(root)
    return below if root and path.startswith(root) and (not below or below.startswith("/")) else path


def _address(scope: Scope, headers: Headers, header: str | None) -> str:
    """Of the asker: of whoever holds the connection, unless a header is configured that our own proxy writes.

    Of a list (`x-forwarded-for`) the last one counts: it is what that proxy saw, the ones before are what it was told.
    """
    if header is not None:
        told = [part.strip() for line in headers.getlist(header) for part in line.split(",")]
        if told and told[-1]:
            return told[-1]
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def _finished(visit: _Visit, headers: Headers) -> Finished:
    state, route = visit.scope["state"], visit.scope.get("route")
    stages = visit.stages
    if visit.began:
        stages = [*stages, Stage("answer", visit.began, time.perf_counter())]
    return Finished(
        visit.scope["method"],
        str(getattr(route, "path", "-")),
        visit.status or 499,
        time.monotonic() - visit.started,
        visit.request_id,
        state["key_name"],
        headers.get("traceparent", ""),
        tuple(stages),
    )
