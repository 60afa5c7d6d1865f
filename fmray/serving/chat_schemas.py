"""Bodies of `/v1/chat/completions`, OpenAI-shaped, and which of its many options change nothing here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
)
from pydantic_core import PydanticCustomError

from fmray.errors import RequestError
from fmray.serving.schemas import (
    EXAMPLE_PICTURE,
    MOST_ITEMS,
    WHOLE,
    Body,
    ImageUrlPart,
    Text,
    TextPart,
    valid_unicode,
)

MOST_STOPS = 4
"""Stop sequences of one request, as at OpenAI."""


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
    tool_calls: Annotated[Any, Field(json_schema_extra={"enum": [None, []]})] = None
    """Refused: this server calls no tools."""
    function_call: Annotated[Any, Field(json_schema_extra={"enum": [None]})] = None
    """Refused, likewise."""


Stop = Annotated[StrictStr, Field(min_length=1, max_length=200), AfterValidator(valid_unicode)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS)]


def _as_stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Body):
    """`{"include_usage": true}`"""

    include_usage: StrictBool = False
    """A last chunk without choices says how many tokens there were."""


TOOLS = "this server calls no tools; leave it out"
PENALTY = "penalties are not built; leave it out"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one answer per request; send 1, and more requests for more answers"),
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


def _refused(name: str) -> Any:
    """An option whose document shows the values that change nothing."""
    return Field(default=None, json_schema_extra={"enum": [None, *REFUSED[name][0]]})


class ChatRequest(Body):
    """Body of `POST /v1/chat/completions`.

    Ignored, because they never change an answer here: `user`, `metadata`, `store`, `service_tier`, `detail` of an image, and
    every field that is not listed. What would change the answer and is not built is refused (`REFUSED`).
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "fmray-vqa",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "text", "text": "what color is it?"},
                                {"type": "image_url", "image_url": {"url": EXAMPLE_PICTURE}},
                            ],
                        }
                    ],
                    "max_tokens": 8,
                }
            ]
        }
    )

    model: Text
    """Id of the served model."""
    messages: Annotated[list[Message], FailFast(), Field(max_length=MOST_ITEMS)]
    """User and assistant in turns, the user's last; before them at most one system message."""
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=2**31), WHOLE] | None = None
    """Longest answer; None: the model's own."""
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31), WHOLE] | None = None
    """Its older name."""
    temperature: Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)] | None = None
    """0 or left out (which is 1 elsewhere): the likeliest token always. More: tokens are drawn."""
    top_p: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = None
    """Share of the probability that is drawn from, the likeliest tokens first; changes nothing at temperature 0."""
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    """The same request with the same seed has the same answer; None: another one each time, where tokens are drawn."""
    stop: Annotated[
        list[Stop] | None,
        Field(max_length=MOST_STOPS),
        BeforeValidator(_as_stops, json_schema_input_type=Stop | Stops | None),
    ] = None
    """Up to four texts at the first of which the answer ends; it is not part of it."""
    logprobs: StrictBool | None = None
    """Tell each token's log-probability, of the model's own distribution."""
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20), WHOLE] | None = None
    """And those of the likeliest tokens beside it; needs `logprobs`."""
    stream: StrictBool | None = None
    """Server-sent events, a token each, the last of them `[DONE]`."""
    stream_options: StreamOptions | None = None
    """How to stream."""
    n: Any = _refused("n")
    logit_bias: Any = _refused("logit_bias")
    frequency_penalty: Any = _refused("frequency_penalty")
    presence_penalty: Any = _refused("presence_penalty")
    repetition_penalty: Any = _refused("repetition_penalty")
    min_tokens: Any = _refused("min_tokens")
    tools: Any = _refused("tools")
    tool_choice: Any = _refused("tool_choice")
    functions: Any = _refused("functions")
    function_call: Any = _refused("function_call")
    response_format: Any = _refused("response_format")
    modalities: Any = _refused("modalities")
    audio: Any = _refused("audio")
    web_search_options: Any = _refused("web_search_options")

    @property
    def longest(self) -> tuple[int | None, str]:
        """Tokens of the longest answer and the option that says so; raises RequestError where two options disagree."""
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            message = f"max_tokens={old} and max_completion_tokens={new} are two names of one limit; send one of them"
            raise RequestError(400, "invalid_value", message, "max_tokens")
        return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


def check_options(body: ChatRequest) -> None:
    """Raises RequestError(400) that names the first option that cannot be honoured, and the cure."""
    for name, (harmless, cure) in REFUSED.items():
        value = getattr(body, name)
        if value is not None and not any(_same(value, other) for other in harmless):
            raise RequestError(400, "unsupported_parameter", f"{name}: {cure}", name)
    if body.top_logprobs and not body.logprobs:
        message = "top_logprobs: it says what logprobs holds; send logprobs=true too"
        raise RequestError(400, "invalid_value", message, "top_logprobs")
    if body.stream_options is not None and not body.stream:
        message = "stream_options: it says how to stream; send stream=true too"
        raise RequestError(400, "invalid_value", message, "stream_options")


def _same(value: Any, other: Any) -> bool:
    """Equal, true and 1 told apart."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


# ------------------------------------------------------------------------------------------------------------------ replies


class AnswerMessage(Body):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class TopLogprob(Body):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]
    """UTF-8 of the token, or of its part of a letter."""


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(Body):
    """Tokens of the answer, its end not among them."""

    content: list[TokenLogprob]
    refusal: None = None


FinishReason = Literal["stop", "length"]
"""`stop`: it ended by itself or at a stop sequence; `length`: it was cut at the longest answer."""


class Choice(Body):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason


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

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "chatcmpl-5f",
                    "object": "chat.completion",
                    "created": 1790000000,
                    "model": "fmray-vqa",
                    "choices": [
                        {
                            "index": 0,
                            "message": {"role": "assistant", "content": "red", "refusal": None},
                            "logprobs": None,
                            "finish_reason": "stop",
                        }
                    ],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
                }
            ]
        }
    )

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: ChatUsage


class Delta(Body):
    """What a chunk adds; empty in the last one."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Body):
    """The one answer, going on."""

    index: int = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Body):
    """One server-sent event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: ChatUsage | None = None
