"""The endpoint's border: request ids, body limits while reading, errors as OpenAI's clients expect them."""

from __future__ import annotations

import logging
import re
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fmray.errors import RequestError
from fmray.serving.schemas import ErrorFacts, ErrorReply

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""A client's own id is echoed where it looks like this: nothing is smuggled into a header or a log."""

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""OpenAI's type of a status; else `invalid_request_error` below 500 and `server_error` from there on."""

ROUTE_ERRORS = {
    404: ("not_found", "no such route"),
    405: ("method_not_allowed", "this route does not take this method"),
}


# ----------------------------------------------------------------------------------------------------- errors


def install_error_answers(app: FastAPI) -> None:
    """Every exception that leaves a route becomes `{"error": {message, type, param, code}}`."""
    for kind in (RequestError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)


async def _answer_error(request: Request, error: Exception) -> Response:
    """Where an exception becomes a status code. The server logs an unexpected one with its traceback."""
    headers: dict[str, str] = {}
    if isinstance(error, RequestValidationError):
        error = _from_validation(error)
    elif isinstance(error, HTTPException):
        headers.update(error.headers or {})
        code, message = ROUTE_ERRORS.get(error.status_code, ("invalid_request", "the request cannot be read"))
        error = RequestError(error.status_code, code, message)
    elif not isinstance(error, RequestError):
        request_id = request.scope["state"]["request_id"]
        logger.error("request %s failed with %s", request_id, type(error).__name__)
        headers["x-request-id"] = request_id  # this answer bypasses Border's `send`
        headers["x-should-retry"] = "false"  # models are deterministic: the same request would fail again
        error = RequestError(
            500, "internal_error", "the server failed on this request; its log has the request id"
        )
    return _error_response(error, headers)


def _error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    kind = ERROR_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    facts = ErrorFacts(message=error.message, type=kind, param=error.param, code=error.code)
    body = ErrorReply(error=facts).model_dump_json()
    return Response(body, error.status, headers, media_type="application/json")


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


class Border:
    """ASGI middleware: gives every request an id, and reads its body up to a limit before the app sees it."""

    def __init__(self, app: ASGIApp, *, max_body: int) -> None:
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            _check_content_type(scope["method"], headers)
            body = await self._read_body(headers, receive)
        except RequestError as error:
            return await _error_response(error)(scope, receive, send_with_id)
        if body is None:
            return None
        replayed = False

        async def receive_body() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_body, send_with_id)

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None where the client left; RequestError(413) at the first byte over the limit."""
        limit = f"the body has more than {self.max_body / 2**20:.0f} MiB"
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_body:
            raise RequestError(413, "request_too_large", limit)
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.max_body:
                raise RequestError(413, "request_too_large", limit)
            more = message.get("more_body", False)
        return b"".join(chunks)


def _check_content_type(method: str, headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and kind != "application/json":
        raise RequestError(415, "unsupported_media_type", "send JSON with content-type: application/json")
