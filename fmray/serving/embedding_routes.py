"""Routes of a dual encoder: texts and images to vectors, and pictures to probabilities of labels.

A request: route (here) -> Batcher.answer -> ClipEngine.forward -> the model. N items  L labels  D width
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import APIRouter, Request, Response
from torch.nn import functional as F

from fmray.errors import RequestError
from fmray.serving.asks import Ask, ImageAsk
from fmray.serving.clip_engine import Embedding, EmbeddingCapabilities
from fmray.serving.embedding_schemas import (
    Classification,
    ClassifyReply,
    ClassifyRequest,
    EmbeddingObject,
    EmbeddingsReply,
    EmbeddingsRequest,
    LabelScore,
)
from fmray.serving.inbound import deadline_of, note_times
from fmray.serving.reading import Reader
from fmray.serving.schemas import JSON, Item, Usage
from fmray.serving.shelf import Shelf
from fmray.serving.zero_shot import NEUTRAL, check_labels, probabilities

FEW = 4
"""Vectors whose reply is written in less time than the way to a thread and back takes."""


class EmbeddingRoutes:
    """`/v1/embeddings` and `/v1/classify` of every dual encoder on the shelf."""

    def __init__(self, shelf: Shelf, reader: Reader, *, max_labels: int) -> None:
        self._shelf, self._reader, self._max_labels = shelf, reader, max_labels

    def add_to(self, router: APIRouter) -> None:
        """These routes."""
        router.post("/v1/embeddings", response_model=EmbeddingsReply)(self.embeddings)
        router.post("/v1/classify", response_model=ClassifyReply)(self.classify)

    # ---------------------------------------------------------------------------------------------- questions

    async def embeddings(self, body: EmbeddingsRequest, request: Request) -> Response:
        """Texts and images to vectors of the model's shared space, in the order of `input`."""
        model = await self._shelf.embedding(body.model, "/v1/embeddings")
        items, field = _items(body)
        width = model.capabilities.dim
        if body.dimensions is not None and body.dimensions > width:
            message = f"dimensions: this model has {width}, ask for 1 to {width}"
            raise RequestError(400, "invalid_value", message, "dimensions")
        on_cpu = model.batcher.admission.on_cpu
        with model.batcher.admission.visit():
            asks = await self._reader.asks(
                request,
                model.batcher.admission,
                items,
                field=field,
                modality=body.modality,
                truncate=body.truncate,
            )
            answered = await model.batcher.answer(asks, deadline_of(request))
            note_times(request, answered)
            usage = usage_of(asks, answered.replies)
            if len(asks) <= FEW:
                reply = _embeddings_reply(body, answered.replies, usage)
            else:
                reply = await on_cpu(_embeddings_reply, body, answered.replies, usage)
        return Response(reply, media_type=JSON)

    async def classify(self, body: ClassifyRequest, request: Request) -> Response:
        """Which label fits each picture, with probabilities, best first."""
        model = await self._shelf.embedding(body.model, "/v1/classify")
        check_labels(body.labels, body.template, max_labels=self._max_labels)
        with model.batcher.admission.visit():
            asks = await self._reader.asks(request, model.batcher.admission, body.input, modality="image")
            neutral = [NEUTRAL] if body.multi_label else []
            labels = await model.labels.of([*body.labels, *neutral], body.template)
            answered = await model.batcher.answer(asks, deadline_of(request))
            note_times(request, answered)
            usage = usage_of(asks, [*labels, *answered.replies])
            reply = await model.batcher.admission.on_cpu(
                _classify_reply, body, answered.replies, labels, usage, model.capabilities
            )
        return Response(reply, media_type=JSON)


def _items(body: EmbeddingsRequest) -> tuple[Sequence[Item], str]:
    """What to embed, and the field that says so; raises RequestError(400)."""
    if not {"input", "messages"} & body.model_fields_set:
        message = "input: give a text, a picture, or a list of them"
        raise RequestError(400, "missing_required_parameter", message, "input")
    if "messages" not in body.model_fields_set:
        return body.input, "input"
    if "input" in body.model_fields_set:
        raise RequestError(400, "invalid_value", "messages: send them or input, not both", "messages")
    if len(body.messages) != 1 or body.messages[0].role != "user":
        message = (
            "messages: one message of the user becomes one vector; send more texts and pictures in input"
        )
        raise RequestError(400, "invalid_value", message, "messages")
    parts = body.messages[0].content
    if len(parts) != 1:
        message = f"messages[0].content has {len(parts)} parts: send one text or one picture"
        raise RequestError(400, "invalid_value", message, "messages[0].content")
    return parts, "messages"


# ---------------------------------------------------------------------------------------------------- replies


def _embeddings_reply(body: EmbeddingsRequest, embedded: Sequence[Embedding], usage: Usage) -> str:
    vectors_ND = torch.stack([one.vector_D for one in embedded])
    if body.dimensions is not None:
        vectors_ND = F.normalize(vectors_ND[:, : body.dimensions], dim=1)
    if body.encoding_format == "base64":
        raw = vectors_ND.numpy().astype("<f4")
        values: list[Any] = [base64.b64encode(row.tobytes()).decode("ascii") for row in raw]
    else:
        values = vectors_ND.tolist()
    data = [EmbeddingObject(index=i, embedding=value) for i, value in enumerate(values)]
    return EmbeddingsReply(data=data, model=body.model, usage=usage).model_dump_json()


def _classify_reply(
    body: ClassifyRequest,
    images: Sequence[Embedding],
    labels: Sequence[Embedding],
    usage: Usage,
    capabilities: EmbeddingCapabilities,
) -> str:
    image_ND = torch.stack([one.vector_D for one in images])
    label_LD = torch.stack([one.vector_D for one in labels[: len(body.labels)]])
    neutral_D = labels[-1].vector_D if body.multi_label else None
    scores_NL = probabilities(image_ND, label_LD, neutral_D, capabilities)
    best = scores_NL.topk(min(body.top_k or len(body.labels), len(body.labels)), dim=1)
    data = []
    for i, (scores, columns) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        probs = [LabelScore(label=body.labels[c], score=s) for c, s in zip(columns, scores, strict=True)]
        data.append(Classification(index=i, label=probs[0].label, probs=probs))
    return ClassifyReply(data=data, model=body.model, usage=usage).model_dump_json()


def usage_of(asks: Sequence[Ask], embedded: Sequence[Embedding]) -> Usage:
    """What some asks cost; `embedded` may hold more than their own (labels)."""
    tokens = sum(one.tokens for one in embedded)
    images = sum(isinstance(ask, ImageAsk) for ask in asks)
    truncated = sum(one.truncated for one in embedded)
    return Usage(prompt_tokens=tokens, total_tokens=tokens, images=images, truncated=truncated)
