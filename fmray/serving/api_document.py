"""The API's document: FastAPI's, with our errors, headers and keys in it, and without what no route here does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from fmray.serving.border import OPEN_PATHS, error_type
from fmray.serving.schemas import ErrorReply


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """A status that any route may answer with. `ErrorStatus("There is no key, or a wrong one.", "invalid_api_key")`"""

    meaning: str
    code: str
    """One that it comes with."""
    param: str | None = None


ERROR_STATUSES = {
    400: ErrorStatus("The request cannot be answered as it is.", "invalid_image", "input[3]"),
    401: ErrorStatus("There is no key, or a wrong one.", "invalid_api_key"),
    404: ErrorStatus("The model is not here, or does not take this route.", "model_not_found", "model"),
    408: ErrorStatus("The body took too long to arrive.", "body_timeout"),
    413: ErrorStatus("The body is too large.", "request_too_large"),
    415: ErrorStatus("The body is not sent as `application/json`.", "unsupported_media_type"),
    429: ErrorStatus("Too much at once: for the model, or from this caller.", "overloaded"),
    500: ErrorStatus("The model failed on this request, and would again.", "model_failed"),
    503: ErrorStatus("The endpoint starts or ends, or its model does not answer.", "shutting_down"),
    504: ErrorStatus("It was not answered within its time.", "deadline_exceeded"),
}

DESCRIPTION = """
Models that embed, classify and rank texts and pictures, and models that answer about pictures, behind OpenAI-shaped routes.
OpenAI's clients work as they are, with `/v1` of this address as their base URL; every route is there without `/v1` too.

Pictures are base64 `data:` URLs, or http(s) addresses of hosts that this endpoint lists. Every error has the shape of
`ErrorReply`, every answer an `x-request-id`: the client's own where it sent one.
"""

PREFIX = "/v1"
COHERE = {"/v1/rerank": "/v2/rerank"}
"""Cohere's newer client asks there, with the same body."""


def short_names(router: APIRouter) -> APIRouter:
    """The same routes without `/v1`, as clients of Infinity and TEI ask for them, and Cohere's; they are not in the document."""
    also = APIRouter()
    for route in router.routes:
        if not isinstance(route, APIRoute) or not route.path.startswith(f"{PREFIX}/"):
            continue
        for path in (route.path.removeprefix(PREFIX), COHERE.get(route.path)):
            if path is not None:
                also.add_api_route(
                    path, route.endpoint, methods=sorted(route.methods or ()), include_in_schema=False
                )
    return also


def error_replies() -> dict[int | str, dict[str, Any]]:
    """What every route may answer instead, as `APIRouter(responses=…)` takes it."""
    return {
        status: {"model": ErrorReply, "description": error.meaning}
        for status, error in ERROR_STATUSES.items()
    }


def install_document(app: FastAPI, *, guarded: bool) -> None:
    """Have `/openapi.json` say what the endpoint does; made when it is first asked for. guarded: keys are asked for."""
    plain, made = app.openapi, dict[str, Any]()

    def document() -> dict[str, Any]:
        if not made:
            made.update(_completed(plain(), guarded))
        return made

    app.openapi = document  # type: ignore[method-assign]


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, method and what the document says of them."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def _completed(document: dict[str, Any], guarded: bool) -> dict[str, Any]:
    for path, method, operation in operations(document):
        replies = operation["responses"]
        replies.pop("422", None)  # what pydantic refuses is a 400 here
        if method == "GET":
            del replies["415"]
        if path in OPEN_PATHS:
            del replies["401"], replies["429"]
        for status, reply in replies.items():
            reply["headers"] = _headers(status)
            if status != "200":
                reply["content"]["application/json"]["example"] = _example(int(status))
        if guarded and path not in OPEN_PATHS:
            operation["security"] = [{"key": []}]
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    if guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _headers(status: str) -> dict[str, Any]:
    texts = {"x-request-id": "The client's own id, or one that was made for it."}
    if status in ("429", "503", "504"):
        texts |= {
            "retry-after": "Seconds after which to ask again.",
            "retry-after-ms": "The same, in milliseconds.",
        }
    elif status == "500":
        texts["x-should-retry"] = "`false`: models are deterministic."
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in texts.items()}


def _example(status: int) -> dict[str, Any]:
    error = ERROR_STATUSES[status]
    kind = error_type(status)
    return {"error": {"message": error.meaning, "type": kind, "param": error.param, "code": error.code}}
