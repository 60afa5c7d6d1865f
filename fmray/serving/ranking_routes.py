"""`/v1/rerank` and `/v1/score`: how alike texts and pictures are, by the cosine of their vectors.

A request: route (here) -> Batcher.answer -> ClipEngine.forward -> the model. N documents  D width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastapi import APIRouter, Request, Response
from torch import Tensor

from fmray.errors import RequestError
from fmray.serving.asks import Ask, TextAsk
from fmray.serving.clip_engine import Embedding
from fmray.serving.embedding_routes import usage_of
from fmray.serving.inbound import deadline_of, note_times
from fmray.serving.ranking_schemas import (
    RankedDocument,
    RankedResult,
    RerankReply,
    RerankRequest,
    Score,
    ScoreReply,
    ScoreRequest,
)
from fmray.serving.reading import Reader
from fmray.serving.schemas import JSON
from fmray.serving.shelf import EmbeddingModel, Shelf


class RankingRoutes:
    """Both routes, of every dual encoder on the shelf."""

    def __init__(self, shelf: Shelf, reader: Reader, *, max_inputs: int) -> None:
        self._shelf, self._reader, self._max_inputs = shelf, reader, max_inputs

    def add_to(self, router: APIRouter) -> None:
        """These routes."""
        router.post("/v1/rerank", response_model=RerankReply)(self.rerank)
        router.post("/v1/score", response_model=ScoreReply)(self.score)

    async def rerank(self, body: RerankRequest, request: Request) -> Response:
        """Documents by how well they fit the query, best first."""
        model = await self._shelf.embedding(body.model, "/v1/rerank")
        admission = model.batcher.admission
        with admission.visit():
            asks = await self._reader.asks(request, admission, [body.query], field="query")
            room = self._max_inputs - 1
            asks += await self._reader.asks(request, admission, body.documents, field="documents", most=room)
            embedded = await self._embedded(model, asks, request)
            reply = await admission.on_cpu(_rerank_reply, body, asks, embedded)
        return Response(reply, media_type=JSON)

    async def score(self, body: ScoreRequest, request: Request) -> Response:
        """The cosine of each pair."""
        model = await self._shelf.embedding(body.model, "/v1/score")
        first, second = len(body.text_1), len(body.text_2)
        if first not in (1, second):
            message = f"text_1 has {first} items and text_2 {second}: send one in text_1, or as many in both"
            raise RequestError(400, "invalid_value", message, "text_1")
        admission = model.batcher.admission
        with admission.visit():
            asks = await self._reader.asks(request, admission, body.text_1, field="text_1")
            room = self._max_inputs - len(asks)
            asks += await self._reader.asks(request, admission, body.text_2, field="text_2", most=room)
            embedded = await self._embedded(model, asks, request)
        vectors_ND = _stacked(embedded)
        cosines_N = (vectors_ND[:first] * vectors_ND[first:]).sum(1)
        data = [Score(index=i, score=score) for i, score in enumerate(cosines_N.tolist())]
        reply = ScoreReply(data=data, model=body.model, usage=usage_of(asks, embedded))
        return Response(reply.model_dump_json(), media_type=JSON)

    async def _embedded(
        self, model: EmbeddingModel, asks: Sequence[Ask], request: Request
    ) -> list[Embedding]:
        answered = await model.batcher.answer(asks, deadline_of(request))
        note_times(request, answered)
        return answered.replies


def _stacked(embedded: Sequence[Embedding]) -> Tensor:
    return torch.stack([one.vector_D for one in embedded])


def _rerank_reply(body: RerankRequest, asks: Sequence[Ask], embedded: Sequence[Embedding]) -> str:
    vectors_ND = _stacked(embedded)
    cosines_N = vectors_ND[1:] @ vectors_ND[0]
    order = cosines_N.argsort(descending=True, stable=True)[: body.top_n or len(cosines_N)]
    results = []
    for place in order.tolist():
        ask = asks[place + 1]
        document = RankedDocument(text=ask.text) if isinstance(ask, TextAsk) else None
        shown = document if body.return_documents else None
        results.append(RankedResult(index=place, relevance_score=cosines_N[place].item(), document=shown))
    return RerankReply(results=results, model=body.model, usage=usage_of(asks, embedded)).model_dump_json()
