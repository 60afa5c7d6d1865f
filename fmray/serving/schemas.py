"""HTTP bodies, OpenAI-shaped. Types are checked here; the model's and the configured limits, where used."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    StrictStr,
    Tag,
    field_validator,
)
from pydantic_core import PydanticCustomError


def valid_unicode(text: str) -> str:
    """Raises PydanticCustomError."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PydanticCustomError("invalid_value", "half a surrogate pair is not text")
    return text


Text = Annotated[StrictStr, AfterValidator(valid_unicode)]
"""A string that can be encoded: JSON can spell some that cannot."""


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


WHOLE = BeforeValidator(_whole)
"""Beside StrictInt: 5.0 is a whole number too, as in JSON's schemas. Behind its bounds, which are not in the document else."""

JSON = "application/json"
"""The media type of a reply that is serialised where it is made, off the event loop."""
MOST_ITEMS = 65_536
"""Items that a list is parsed to at most, whatever is configured: bounds a hostile body's memory."""

EXAMPLE_PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mM8ISfHgA0wMeAAg1MCANDKARQfGKMRAAAA"
    "AElFTkSuQmCC"
)
"""A red square, for the document's examples: they can be sent as they stand."""


class Body(BaseModel):
    """A request or a reply. Fields it does not list are ignored, as existing clients send many."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True, protected_namespaces=())


# -------------------------------------------------------------------------------------- one text or one image


class TextPart(Body):
    """`{"type": "text", "text": "a red heart"}`, or without the type (Jina)."""

    type: Literal["text"] = "text"
    text: Text


class ImageUrl(Body):
    """`{"url": "data:image/png;base64,…"}`; `detail` is ignored."""

    url: Text


class ImageUrlPart(Body):
    """`{"type": "image_url", "image_url": {"url": "data:…"}}`; `image_url` may be the string itself."""

    type: Literal["image_url"] = "image_url"
    image_url: ImageUrl

    @field_validator("image_url", mode="before")
    @classmethod
    def _plain_string(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class ImagePart(Body):
    """`{"image": "data:image/png;base64,…"}` (Jina)."""

    image: Text


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "string"
    if isinstance(value, dict):
        return next((key for key in ("image_url", "image", "text") if key in value), None)
    return None


Item = Annotated[
    Annotated[Text, Tag("string")]
    | Annotated[TextPart, Tag("text")]
    | Annotated[ImageUrlPart, Tag("image_url")]
    | Annotated[ImagePart, Tag("image")],
    Discriminator(
        _kind,
        custom_error_type="invalid_value",
        custom_error_message=(
            "expected a string, {'type': 'text', 'text': …}, {'type': 'image_url', 'image_url': {'url': …}} "
            "or {'image': …}; token ids are not supported"
        ),
    ),
]
"""A text, or a picture as a base64 `data:` URL."""


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Items = Annotated[
    list[Item],
    FailFast(),
    Field(max_length=MOST_ITEMS),
    BeforeValidator(_as_list, json_schema_input_type=Item | list[Item]),
]
"""One item or a list of them."""

Strings = Annotated[
    list[Text],
    FailFast(),
    Field(max_length=MOST_ITEMS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
"""One string or a list of them."""


# ---------------------------------------------------------------------------------------------------- replies


class Usage(Body):
    """What a request cost."""

    prompt_tokens: int
    """Text tokens read."""
    total_tokens: int
    """The same: nothing is generated."""
    images: int
    """Pictures read."""
    truncated: int
    """Texts that had more tokens than the model reads."""


class ModelFacts(Body):
    """What fmray adds to OpenAI's model object."""

    kind: Literal["clip", "vqa", "mllm"]
    modalities: list[str]
    """What it reads."""
    output: Literal["embedding", "text"]
    """What it makes of that."""
    routes: list[str]
    """Where to ask it."""
    dim: int | None
    """Width of an embedding; null where it makes none."""
    max_length: int
    """Tokens of a text; of a conversation, pictures among them; of a VQA model's question."""
    max_answer_tokens: int | None
    """Tokens of an answer where the request names no limit; null where it says nothing."""
    image_size: int
    """Side of the square that a picture becomes."""
    limits: dict[str, float]
    """What one request may hold."""


class ModelObject(Body):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    """Seconds since 1970 at which it was loaded; 0: it is loaded when somebody asks for it."""
    owned_by: str = "fmray"
    fmray: ModelFacts | None = None
    """What it can do, once it is loaded."""


class ModelList(Body):
    """Reply of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Health(Body):
    """Reply of `GET /health`: the process answers."""

    status: Literal["ok"] = "ok"


class Version(Body):
    """Reply of `GET /version`."""

    version: str
    """Of fmray."""


class Ready(Body):
    """Reply of `GET /ready`: every model has just answered a synthetic item."""

    status: Literal["ready"] = "ready"
    models: list[str]


class ErrorFacts(Body):
    """What went wrong, for a program and for a person."""

    message: str
    type: str
    param: str | None
    """`input[3]`: where in the request."""
    code: str


class ErrorReply(Body):
    """Every reply with a status of 400 or more."""

    error: ErrorFacts
