"""Bodies of `/v1/chat/completions`, OpenAI-shaped, and which of its many options change nothing here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, FailFast, Field, StrictInt, Tag
from pydantic_core import PydanticCustomError

from fmray.errors import RequestError
from fmray.serving.schemas import MOST_ITEMS, Body, ImageUrlPart, Text, TextPart


def _part_kind(value: Any) -> str | None:
    """By the type where there is one: an unknown type is not taken for a text because it has one beside it."""
    if not isinstance(value, dict):
        return None
    kind = value.get("type", next((key for key in ("image_url", "text") if key in value), None))
    return kind if isinstance(kind, str) else None


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[ImageUrlPart, Tag("image_url")],
    Discriminator(
        _part_kind,
        custom_error_type="invalid_value",
        custom_error_message=(
            "expected {'type': 'text', 'text': …} or {'type': 'image_url', 'image_url': {'url': 'data:…'}}"
        ),
    ),
]
"""A text, or a picture as a base64 `data:` URL."""


def _as_parts(value: Any) -> Any:
    if not isinstance(value, str | list | None):
        raise PydanticCustomError("invalid_value", "expected a text or a list of parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value or []


class Message(Body):
    """`{"role": "user", "content": "what color is it?"}`, or with parts as the content.

    Ignored: `name`, which no template of ours shows to the model.
    """

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is another name of `system`."""
    content: Annotated[
        list[Part],
        FailFast(),
        Field(max_length=MOST_ITEMS, default_factory=list),
        BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None),
    ]
    """A text, or texts and pictures in their order. What is a picture is said by the part: a text `<image>` is a text."""
    tool_calls: Any = None
    """Refused: this server calls no tools."""
    function_call: Any = None
    """Refused, likewise."""


class ChatRequest(Body):
    """Body of `POST /v1/chat/completions`.

    Answers are greedy: the likeliest token, always the same. Ignored, because they change nothing then: `seed`, `top_p`,
    `top_k`, `min_p`; because they never do: `user`, `metadata`, `store`, `service_tier`, `detail` of an image, `stream_options`
    and every field that is not listed. What would change the answer and is not built is refused (`REFUSED`).
    """

    model: Text
    """Id of the served model."""
    messages: Annotated[list[Message], FailFast(), Field(max_length=MOST_ITEMS)]
    """User and assistant in turns, the user's last; before them at most one system message."""
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    """Longest answer; None: the model's own."""
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    """Its older name."""
    temperature: Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)] | None = None
    """0 or left out (which is 1 elsewhere): greedy. More is refused."""
    stream: Any = None
    n: Any = None
    stop: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    min_tokens: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None

    @property
    def longest(self) -> tuple[int | None, str]:
        """Tokens of the longest answer and the option that says so; raises RequestError where two options disagree."""
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            message = f"max_tokens={old} and max_completion_tokens={new} are two names of one limit; send one of them"
            raise RequestError(400, "invalid_value", message, "max_tokens")
        return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


GREEDY = "answers are greedy here, the likeliest token always; send 0 or leave it out"
TOOLS = "this server calls no tools; leave it out"
PENALTY = "penalties are not built; leave it out"
PROBABILITIES = "probabilities are not returned; leave it out"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "temperature": ((0,), GREEDY),
    "stream": ((False,), "answers come whole; send false"),
    "n": ((1,), "one answer per request, and another one would be the same; send 1"),
    "stop": (("", []), "stop sequences are not built; leave it out and cut the answer"),
    "logprobs": ((False,), PROBABILITIES),
    "top_logprobs": ((0,), PROBABILITIES),
    "logit_bias": (({},), "it is not built; leave it out"),
    "frequency_penalty": ((0,), PENALTY),
    "presence_penalty": ((0,), PENALTY),
    "repetition_penalty": ((1,), PENALTY),
    "min_tokens": ((0,), "it is not built; leave it out"),
    "tools": (([],), TOOLS),
    "tool_choice": (("none", "auto"), TOOLS),
    "functions": (([],), TOOLS),
    "function_call": (("none", "auto"), TOOLS),
    "response_format": (({"type": "text"},), "answers are plain text; send {'type': 'text'}"),
    "modalities": ((["text"],), "answers are text; send ['text']"),
    "audio": ((), "answers are text; leave it out"),
    "web_search_options": ((), "nothing is searched; leave it out"),
}
"""Options that would change an answer and are not built: the values that change nothing, and the cure for others."""


def check_options(body: ChatRequest) -> None:
    """Raises RequestError(400) that names the first option that cannot be honoured, and the cure."""
    for name, (harmless, cure) in REFUSED.items():
        value = getattr(body, name)
        if value is not None and not any(_same(value, other) for other in harmless):
            raise RequestError(400, "unsupported_parameter", f"{name}: {cure}", name)


def _same(value: Any, other: Any) -> bool:
    """Equal, true and 1 told apart."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


# ------------------------------------------------------------------------------------------------------------------ replies


class AnswerMessage(Body):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Body):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]
    """`stop`: it ended by itself; `length`: it was cut at the longest answer."""


class ChatUsage(Body):
    """Tokens of a conversation."""

    prompt_tokens: int
    """Read: pictures' among them where they stand among the words; of a VQA model the question's."""
    completion_tokens: int
    """Said, the end among them."""
    total_tokens: int
    """Both."""


class ChatReply(Body):
    """Reply of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: ChatUsage
