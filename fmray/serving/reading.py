"""From what a request holds to asks: charged to the caller, pictures fetched where they are addresses; large ones in threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import Request

from fmray.config.serving import ServeConfig
from fmray.errors import RequestError
from fmray.serving.admission import MIB, Admission
from fmray.serving.asks import Ask, ImageAsk, Modality, read_asks, web_addresses
from fmray.serving.chat_schemas import Message
from fmray.serving.conversations import ChatLimits, picture_addresses, read_conversation
from fmray.serving.fetch import Fetcher
from fmray.serving.rate_limits import charge
from fmray.serving.schemas import Item
from fmray.types import Dialogue

SMALL_BYTES = 65_536
"""Of base64 takes a twentieth of a millisecond to decode, on the event loop."""


class Reader:
    """Reads every route's items within the configured limits. One per process."""

    def __init__(self, config: ServeConfig, fetcher: Fetcher) -> None:
        self._config, self._fetcher = config, fetcher
        self._max_image_bytes = config.max_image_mib * MIB
        self._chat_limits = ChatLimits(config.max_inputs, config.max_images, self._max_image_bytes)

    async def asks(
        self,
        request: Request,
        admission: Admission,
        items: Sequence[Item],
        *,
        field: str = "input",
        modality: Modality = "auto",
        truncate: bool = True,
        most: int | None = None,
    ) -> list[Ask]:
        """A field's items in order; raises RequestError(400) that names one (`input[3]`), 429 beyond the caller's limit.

        most: how many there may be; None: as configured.
        """
        most = self._config.max_inputs if most is None else most
        if len(items) > most:  # before anything is fetched
            raise RequestError(400, "too_many_inputs", f"{field} has more than {most} items", field)
        await charge(request, len(items))
        fetched = await self._fetched(web_addresses(items, modality=modality, field=field))
        read = partial(
            read_asks,
            modality=modality,
            max_inputs=most,
            max_image_bytes=self._max_image_bytes,
            truncate=truncate,
            field=field,
            fetched=fetched,
        )
        return read(items) if _is_small(request) else await admission.on_cpu(read, items)

    async def conversation(
        self, request: Request, admission: Admission, messages: Sequence[Message]
    ) -> tuple[Dialogue, dict[str, ImageAsk]]:
        """A chat's messages; raises RequestError(400) that names one, 429 beyond the caller's limit."""
        await charge(request, 1)
        fetched = await self._fetched(picture_addresses(messages[: self._config.max_inputs]))
        if _is_small(request):
            return read_conversation(messages, self._chat_limits, fetched)
        return await admission.on_cpu(read_conversation, messages, self._chat_limits, fetched)

    async def _fetched(self, urls: dict[str, str]) -> dict[str, bytes]:
        if not urls:
            return {}
        return await self._fetcher.resolve_urls(urls, max_bytes=self._config.max_body_mib * MIB)


def _is_small(request: Request) -> bool:
    """Whether reading it takes less than the way to a thread and back; a body whose length is not told may be large."""
    length = request.headers.get("content-length", "")
    return length.isdecimal() and len(length) <= 5 and int(length) <= SMALL_BYTES
