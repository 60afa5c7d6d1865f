"""Routes of the search among indexed pictures: `/v1/search` and `/v1/indexes`.

A request: the query becomes a vector where every text and image does, then the index is asked in the pool of CPU threads.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request, Response

from fmray.errors import RequestError
from fmray.serving.asks import Ask, ImageAsk, TextAsk, checked_text
from fmray.serving.clip_engine import Embedding
from fmray.serving.images import image_bytes, is_data_url
from fmray.serving.inbound import deadline_of, note_times
from fmray.serving.index_shelf import IndexShelf
from fmray.serving.index_store import PictureIndex
from fmray.serving.rate_limits import charge
from fmray.serving.schemas import JSON, ImagePart, ImageUrlPart, Item, TextPart, Usage
from fmray.serving.search_schemas import IndexList, IndexObject, SearchHit, SearchReply, SearchRequest
from fmray.serving.shelf import EmbeddingModel, Shelf

Value = TypeVar("Value")


class OnCpu(Protocol):
    """Runs CPU work of a request off the event loop."""

    def __call__(self, work: Callable[..., Value], *arguments: Any) -> Awaitable[Value]: ...


@dataclass(frozen=True, slots=True)
class QueryEncoder:
    """A served dual encoder, as the search sees it: `QueryEncoder("fmray-clip", answer, batcher.admission.on_cpu)`."""

    model_id: str
    answer: Callable[[Sequence[Ask], Request], Awaitable[list[Embedding]]]
    """One unit vector per ask; raises RequestError (busy, too late)."""
    on_cpu: OnCpu


def query_encoder(model: EmbeddingModel) -> QueryEncoder:
    """A model of the shelf, asked as `/v1/embeddings` asks it: charged to the caller, within the request's deadline."""

    async def answer(asks: Sequence[Ask], request: Request) -> list[Embedding]:
        await charge(request, len(asks))
        with model.batcher.admission.visit():
            answered = await model.batcher.answer(asks, deadline_of(request))
        note_times(request, answered)
        return list(answered.replies)

    return QueryEncoder(model.id, answer, model.batcher.admission.on_cpu)


class ServedEncoders(Mapping[str, Value]):
    """What there is to know of the shelf's dual encoders just now, by the content hashes of their checkpoints."""

    def __init__(self, shelf: Shelf, of: Callable[[EmbeddingModel], Value]) -> None:
        self._shelf, self._of = shelf, of

    def _models(self) -> dict[str, EmbeddingModel]:
        models = [model for model in self._shelf.models if isinstance(model, EmbeddingModel)]
        return {model.content_hash: model for model in models if model.content_hash is not None}

    def __getitem__(self, content_hash: str) -> Value:
        return self._of(self._models()[content_hash])

    def __iter__(self) -> Iterator[str]:
        return iter(self._models())

    def __len__(self) -> int:
        return len(self._models())


class SearchRoutes:
    """`/v1/search` and `/v1/indexes` beside the models whose vectors the indexes hold."""

    def __init__(
        self, encoders: Mapping[str, QueryEncoder], shelf: IndexShelf, *, max_image_bytes: int
    ) -> None:
        """`encoders`: by the content hash of their checkpoint; looked at for every request, so it may change."""
        self._encoders, self._shelf, self._max_image_bytes = encoders, shelf, max_image_bytes

    def add_to(self, router: APIRouter) -> None:
        """These routes."""
        router.get("/v1/indexes")(self.list_indexes)
        router.post("/v1/search", response_model=SearchReply)(self.search)

    async def list_indexes(self) -> IndexList:
        """The indexes that can be searched."""
        opened = [self._shelf.get(name) for name in self._shelf.names]
        return IndexList(data=[_about(name, index) for name, index in opened])

    async def search(self, body: SearchRequest, request: Request) -> Response:
        """The indexed pictures nearest to a text or a picture, best first."""
        name, index = self._shelf.get(body.index)
        encoder = self._encoder(name, index, body.model)
        ask = await encoder.on_cpu(self._read, body.query)
        [embedded] = await encoder.answer([ask], request)
        reply = await encoder.on_cpu(_search_reply, body, name, index, encoder.model_id, ask, embedded)
        return Response(reply, media_type=JSON)

    def _encoder(self, name: str, index: PictureIndex, asked: str | None) -> QueryEncoder:
        """The model that made the index. Raises RequestError where it is not served, or another one is asked for."""
        encoder = self._encoders.get(index.facts.checkpoint)
        if encoder is None:  # the model was replaced while requests run
            message = (
                f"the index {name!r} is of a checkpoint that is not served any more; it waits for a new one"
            )
            raise RequestError(503, "index_outdated", message, "index")
        if asked is not None and asked != encoder.model_id:
            message = f"the index {name!r} was made by {encoder.model_id!r}, not by {asked[:100]!r}"
            raise RequestError(404, "model_not_found", message, "model")
        return encoder

    def _read(self, item: Item) -> Ask:
        """The query; raises RequestError(400) with `param="query"`."""
        match item:
            case ImageUrlPart():
                url: str | None = item.image_url.url
            case ImagePart():
                url = item.image
            case TextPart():
                return TextAsk(checked_text(item.text, "query"), "query")
            case _:
                url = item if is_data_url(item) else None
                if url is None:
                    return TextAsk(checked_text(item, "query"), "query")
        assert url is not None
        return ImageAsk(image_bytes(url, "query", max_bytes=self._max_image_bytes), "query")


def _search_reply(
    body: SearchRequest, name: str, index: PictureIndex, model_id: str, ask: Ask, embedded: Embedding
) -> str:
    prefix = (body.filter.prefix or "") if body.filter else ""
    captions = body.filter.caption if body.filter else None
    captions = [captions] if isinstance(captions, str) else captions
    found = index.search(embedded.vector_D.numpy(), body.top_k, prefix=prefix, captions=captions)
    with_thumbnails = "thumbnails" in body.include
    data = [
        SearchHit(
            index=place,
            id=hit.key,
            score=hit.score,
            caption=hit.caption,
            thumbnail=_jpeg_url(index.thumbnail(hit.row)) if with_thumbnails else None,
        )
        for place, hit in enumerate(found)
    ]
    usage = Usage(
        prompt_tokens=embedded.tokens,
        total_tokens=embedded.tokens,
        images=int(isinstance(ask, ImageAsk)),
        truncated=int(embedded.truncated),
    )
    reply = SearchReply(data=data, index=name, model=model_id, usage=usage)
    return reply.model_dump_json(exclude_none=True)


def _jpeg_url(jpeg: bytes | None) -> str | None:
    return None if jpeg is None else f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"


def _about(name: str, index: PictureIndex) -> IndexObject:
    facts = index.facts
    return IndexObject(
        id=name,
        created=facts.built_at,
        count=facts.count,
        dim=facts.dim,
        kind=facts.kind,
        thumbnails=facts.thumbnail > 0,
        checkpoint=facts.checkpoint[:12],
    )
