"""From messages to a dialogue: turns by structure, pictures beside them, and a refusal that names what cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmray.errors import RequestError
from fmray.serving.asks import MAX_TEXT_CHARACTERS, ImageAsk, is_web_address
from fmray.serving.chat_schemas import Message
from fmray.serving.images import image_bytes
from fmray.serving.schemas import ImageUrlPart
from fmray.types import Dialogue, Turn


@dataclass(frozen=True, slots=True)
class ChatAsk:
    """One conversation, its pictures, and how it wants to be answered.

    `ChatAsk(Dialogue("messages", ("5e88…",), (Turn(("", "what color is it?"), ""),)), {"5e88…": ImageAsk(b"\\x89PNG…", "…")})`
    """

    dialogue: Dialogue
    """Ends with a question; pictures by the digests of their bytes, so that one that is sent twice is read once."""
    images: dict[str, ImageAsk]
    """Encoded, by those digests."""
    max_new_tokens: int | None = None
    """Longest answer; None: the model's own."""
    length_option: str = "max_tokens"
    """What the request calls that."""
    temperature: float = 0.0
    """0: the likeliest token always."""
    top_p: float = 1.0
    """Share of the probability that is drawn from."""
    seed: int = 0
    """The same request with the same seed has the same answer."""
    top_logprobs: int = 0
    """Alternatives told beside each token."""

    @property
    def size(self) -> int:
        """Bytes, about."""
        return sum(image.size for image in self.images.values())


@dataclass(frozen=True, slots=True)
class ChatLimits:
    """What one conversation may hold. `ChatLimits(parts=2048, images=16, image_bytes=10 * 2**20)`"""

    parts: int
    images: int
    image_bytes: int


def read_conversation(
    messages: Sequence[Message], limits: ChatLimits, fetched: Mapping[str, bytes] | None = None
) -> tuple[Dialogue, dict[str, ImageAsk]]:
    """Messages as a dialogue and its pictures; raises RequestError(400) with `param="messages[2].content[1]"`.

    Several texts of one message are joined by line breaks. User and assistant take turns, beginning and ending with the user.
    fetched: the pictures of `picture_addresses`, by their names.
    """
    _check_size(messages, limits)
    reader = _Reader(limits, fetched or {})
    for position, message in enumerate(messages):
        name = f"messages[{position}]"
        if message.tool_calls not in (None, []) or message.function_call is not None:
            raise RequestError(400, "unsupported_parameter", f"{name}: this server calls no tools", name)
        if not message.content:
            raise RequestError(400, "missing_required_parameter", f"{name} has no content", name)
        if message.role == "user":
            reader.user(message, name)
        elif message.role == "assistant":
            reader.assistant(message, name)
        else:
            reader.lead(message, name, first=position == 0)
    return reader.dialogue(), reader.images


def picture_addresses(messages: Sequence[Message]) -> dict[str, str]:
    """The pictures at an http(s) address, by their names (`messages[2].content[1]`)."""
    return {
        f"messages[{place}].content[{position}]": part.image_url.url
        for place, message in enumerate(messages)
        for position, part in enumerate(message.content)
        if isinstance(part, ImageUrlPart) and is_web_address(part.image_url.url)
    }


def _check_size(messages: Sequence[Message], limits: ChatLimits) -> None:
    if not messages:
        raise RequestError(400, "empty_input", "messages is empty", "messages")
    parts = [part for message in messages for part in message.content]
    if max(len(parts), len(messages)) > limits.parts:
        message = f"messages have more than {limits.parts} parts"
        raise RequestError(400, "too_many_inputs", message, "messages")
    pictures = sum(isinstance(part, ImageUrlPart) for part in parts)
    if pictures > limits.images:
        message = f"messages have {pictures} pictures, at most {limits.images} are read"
        raise RequestError(400, "too_many_inputs", message, "messages")
    if sum(len(part.text) for part in parts if not isinstance(part, ImageUrlPart)) > MAX_TEXT_CHARACTERS:
        message = f"messages have more than {MAX_TEXT_CHARACTERS} characters"
        raise RequestError(400, "context_length_exceeded", message, "messages")


class _Reader:
    """The conversation so far."""

    def __init__(self, limits: ChatLimits, fetched: Mapping[str, bytes]) -> None:
        self._fetched = fetched
        self.images: dict[str, ImageAsk] = {}
        self._limits = limits
        self._system = ""
        self._turns: list[Turn] = []
        self._keys: list[str] = []
        self._question: tuple[str, ...] | None = None

    def lead(self, message: Message, name: str, *, first: bool) -> None:
        """A system message."""
        if not first:
            raise RequestError(
                400, "invalid_value", f"{name}: a system message stands before all others, once", name
            )
        self._system = _words(message, name)

    def user(self, message: Message, name: str) -> None:
        """A question: texts, and between them pictures."""
        if self._question is not None:
            cure = "user and assistant take turns; put both texts into one message"
            raise RequestError(400, "invalid_value", f"{name} follows another user's message: {cure}", name)
        texts = [""]
        for position, part in enumerate(message.content):
            if isinstance(part, ImageUrlPart):
                self._keys.append(self._picture(part.image_url.url, f"{name}.content[{position}]"))
                texts.append("")
            else:
                texts[-1] = f"{texts[-1]}\n{part.text}" if texts[-1] else part.text
        if len(texts) == 1 and not texts[0].strip():
            raise RequestError(400, "empty_input", f"{name} has neither text nor picture", name)
        self._question = tuple(texts)

    def assistant(self, message: Message, name: str) -> None:
        """An earlier answer, which may be empty: models say that too."""
        if self._question is None:
            raise RequestError(400, "invalid_value", f"{name}: an assistant's message follows a user's", name)
        self._turns.append(Turn(self._question, _words(message, name)))
        self._question = None

    def dialogue(self) -> Dialogue:
        """All of it; the last answer is yet to be said."""
        if self._question is None:
            message = "messages end without a question: the last one must be the user's"
            raise RequestError(400, "invalid_value", message, "messages")
        turns = (*self._turns, Turn(self._question, ""))
        return Dialogue("messages", tuple(self._keys), turns, system=self._system)

    def _picture(self, url: str, name: str) -> str:
        image = image_bytes(url, name, max_bytes=self._limits.image_bytes, fetched=self._fetched)
        key = hashlib.sha256(image).hexdigest()
        self.images.setdefault(key, ImageAsk(image, name))
        return key


def _words(message: Message, name: str) -> str:
    """The text of a message that can have no picture."""
    texts = []
    for part in message.content:
        if isinstance(part, ImageUrlPart):
            what = f"{name}: only a user's message can have pictures"
            raise RequestError(400, "invalid_value", what, name)
        texts.append(part.text)
    return "\n".join(texts)
