"""Loaded by `schemathesis run`: names models that there are, and says what may be refused though it fits the document."""

from __future__ import annotations

from typing import Any

import schemathesis

CLIP, ANSWERING = "fmray-clip", ("fmray-vqa", "fmray-mllm")
REASONS = {
    *("url_not_allowed", "invalid_image", "unsupported_image_format"),  # a string that is no picture
    *("empty_input", "context_length_exceeded", "too_many_inputs"),  # sizes, in letters, tokens and items
}
"""Codes of what a JSON schema cannot say."""
RELATIONS = (
    "messages",
    "labels",
    "template",
    "dimensions",
    "text_1",
    "top_logprobs",
    "stream_options",
    "max_tokens",
)
"""Fields whose values can be wrong beside other fields, or for the model that is asked."""


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Half of the answers of each kind of model; what is not a string stays wrong."""
    path = context.operation.path
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        if path == "/v1/search":
            body["model"] = None
        else:
            body["model"] = ANSWERING[len(body["model"]) % 2] if path.startswith("/v1/chat") else CLIP
    return body


@schemathesis.check
def refused_for_a_reason(_context: Any, response: Any, case: Any) -> None:
    """Of what fits the document only that is refused which no schema can rule out."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code < 400:
        return
    error = response.json()["error"]
    field = str(error["param"]).partition("[")[0]
    if field == "seed":  # it counts in doubles, for which 2^63 and its neighbours are one
        return
    known = response.status_code == 400 and (
        error["code"] in REASONS or field in RELATIONS or error["message"].endswith(" are expected")
    )
    assert known or response.status_code == 404, f"refused: {response.text}"


@schemathesis.check
def undeclared_methods_are_refused(_context: Any, response: Any, case: Any) -> None:
    """405 says what is allowed; a POST without JSON is refused before anybody asks where it goes."""
    declared = {method.upper() for method in case.operation.schema[case.operation.path]}
    if response.request.method.upper() in declared | {"HEAD"}:
        return
    assert response.status_code == 415 or (response.status_code == 405 and response.headers["allow"]), (
        f"{response.request.method} {case.operation.path}: {response.status_code}"
    )


@schemathesis.check
def every_error_is_ours(_context: Any, response: Any, _case: Any) -> None:
    """Whatever was sent: four facts, an id, and nothing of the inside."""
    assert response.headers["x-request-id"][0]
    if response.status_code < 400:
        return
    assert response.status_code < 500 or response.status_code in (503, 504), response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"], response.text
    for inside in ("Traceback", "0x7f", 'File "', "site-packages", "object at", "pydantic"):
        assert inside not in error["message"], response.text
