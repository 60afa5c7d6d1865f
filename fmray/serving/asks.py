"""What a request asks of the model: texts and encoded pictures, each with a name for errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fmray.errors import RequestError
from fmray.serving.images import image_bytes, is_data_url
from fmray.serving.schemas import ImagePart, ImageUrlPart, Item, TextPart

MAX_TEXT_CHARACTERS = 122_880
"""Longer texts are refused before the tokenizer reads them."""

Modality = Literal["auto", "text", "image"]


@dataclass(frozen=True, slots=True)
class TextAsk:
    """`TextAsk("a red heart", name="input[0]")`"""

    text: str
    name: str
    """What to call it in an error."""
    truncate: bool = True
    """False: a text of too many tokens is refused."""

    @property
    def size(self) -> int:
        """Bytes, about."""
        return len(self.text)


@dataclass(frozen=True, slots=True)
class ImageAsk:
    """`ImageAsk(b"\\x89PNG…", name="input[3]")`"""

    image: bytes
    name: str
    """What to call it in an error."""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.image)


Ask = TextAsk | ImageAsk


def read_asks(
    items: Sequence[Item],
    *,
    modality: Modality,
    max_inputs: int,
    max_image_bytes: int,
    truncate: bool = True,
    field: str = "input",
    fetched: Mapping[str, bytes] | None = None,
) -> list[Ask]:
    """The items of a request's field in order; raises RequestError(400) with `param="input[3]"`.

    `modality` `auto`: a plain string is a text unless it is a `data:` URL; `image`: all must be pictures. `fetched`: the
    pictures of `web_addresses`, by their names.
    """
    if not items:
        raise RequestError(400, "empty_input", f"{field} is empty", field)
    if len(items) > max_inputs:
        raise RequestError(400, "too_many_inputs", f"{field} has more than {max_inputs} items", field)
    asks: list[Ask] = []
    for position, item in enumerate(items):
        name = f"{field}[{position}]"
        url, text = _url_or_text(item, modality)
        if url is not None:
            if modality == "text":
                raise RequestError(400, "invalid_value", f"{name} is an image where texts are expected", name)
            asks.append(ImageAsk(image_bytes(url, name, max_bytes=max_image_bytes, fetched=fetched), name))
        elif modality == "image":
            raise RequestError(400, "invalid_value", f"{name} is a text where images are expected", name)
        else:
            asks.append(TextAsk(checked_text(text, name), name, truncate))
    return asks


def web_addresses(items: Sequence[Item], *, modality: Modality, field: str = "input") -> dict[str, str]:
    """The items that are pictures at an http(s) address, by their names."""
    urls = {f"{field}[{position}]": _url_or_text(item, modality)[0] for position, item in enumerate(items)}
    return {name: url for name, url in urls.items() if url is not None and is_web_address(url)}


def is_web_address(url: str) -> bool:
    """Whether it says http:// or https://, in letters of either case."""
    return url[:8].lower().startswith(("http://", "https://"))


def _url_or_text(item: Item, modality: Modality) -> tuple[str | None, str]:
    match item:
        case ImageUrlPart():
            return item.image_url.url, ""
        case ImagePart():
            return item.image, ""
        case TextPart():
            return None, item.text
    is_url = modality == "image" or (modality == "auto" and is_data_url(item))
    return (item, "") if is_url else (None, item)


def checked_text(text: str, name: str) -> str:
    """A text that the tokenizer may read; raises RequestError(400) with `param=name`."""
    if not text.strip():
        raise RequestError(400, "empty_input", f"{name} is empty", name)
    if len(text) > MAX_TEXT_CHARACTERS:
        message = f"{name} has more than {MAX_TEXT_CHARACTERS} characters"
        raise RequestError(400, "context_length_exceeded", message, name)
    return text
