"""The endpoint: OpenAI-shaped routes over an engine. The same app in local mode and in a Ray Serve replica.

A request: route (here) -> EngineRunner.answer -> engine.forward -> the model. N items  L labels  D width
"""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import APIRouter, FastAPI, Response
from torch.nn import functional as F

import fmray
from fmray.config.schema import ServeConfig
from fmray.errors import RequestError
from fmray.serving.asks import Ask, ImageAsk, Modality, read_asks
from fmray.serving.border import Border, install_error_answers
from fmray.serving.engines import Embedding, EmbeddingEngine, EngineRunner
from fmray.serving.schemas import (
    Classification,
    ClassifyReply,
    ClassifyRequest,
    EmbeddingObject,
    EmbeddingsReply,
    EmbeddingsRequest,
    ErrorReply,
    Health,
    Item,
    LabelScore,
    ModelFacts,
    ModelList,
    ModelObject,
    Usage,
)
from fmray.serving.zero_shot import NEUTRAL, LabelVectors, check_labels, probabilities

MIB = 2**20
JSON = "application/json"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 404, 413, 415, 500)
}


def build_app(engine: EmbeddingEngine, config: ServeConfig) -> FastAPI:
    """The ASGI app that serves a warm engine under `config.model_id`."""
    runner: EngineRunner[Ask, Embedding] = EngineRunner(engine)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        runner.close()

    app = FastAPI(title="fmray", version=fmray.__version__, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Border, max_body=config.max_body_mib * MIB)
    install_error_answers(app)
    app.include_router(Endpoint(runner, config).router())
    return app


class Endpoint:
    """The routes of one model."""

    def __init__(self, runner: EngineRunner[Ask, Embedding], config: ServeConfig) -> None:
        self._config = config
        self._capabilities = runner.engine.capabilities
        self._runner = runner
        self._labels = LabelVectors(runner.answer)
        self._created = int(time.time())

    def router(self) -> APIRouter:
        """The routes, for an app to include."""
        router = APIRouter(responses=ERRORS)
        router.get("/health")(self.health)
        router.get("/v1/models")(self.list_models)
        router.get("/v1/models/{model_id:path}")(self.get_model)
        router.post("/v1/embeddings", response_model=EmbeddingsReply)(self.embeddings)
        router.post("/v1/classify", response_model=ClassifyReply)(self.classify)
        return router

    # --------------------------------------------------------------------------------------- the model itself

    async def health(self) -> Health:
        """The process answers."""
        return Health()

    async def list_models(self) -> ModelList:
        """The served model, in a list."""
        return ModelList(data=[await self.get_model(self._config.model_id)])

    async def get_model(self, model_id: str) -> ModelObject:
        """What the served model can do."""
        self._check_model(model_id)
        config, can = self._config, self._capabilities
        limits = {
            "inputs": config.max_inputs,
            "labels": config.max_labels,
            "body_mib": config.max_body_mib,
            "image_mib": config.max_image_mib,
            "image_megapixels": config.max_image_megapixels,
        }
        facts = ModelFacts(
            modalities=list(can.modalities),
            dim=can.dim,
            max_length=can.max_tokens,
            image_size=can.image_size,
            limits=limits,
        )
        return ModelObject(id=config.model_id, created=self._created, fmray=facts)

    def _check_model(self, asked: str) -> None:
        if asked != self._config.model_id:
            message = f"the model {asked[:100]!r} is not served here; this is {self._config.model_id!r}"
            raise RequestError(404, "model_not_found", message, "model")

    # ---------------------------------------------------------------------------------------------- questions

    async def embeddings(self, body: EmbeddingsRequest) -> Response:
        """Texts and images to vectors of the model's shared space, in the order of `input`."""
        self._check_model(body.model)
        width = self._capabilities.dim
        if body.dimensions is not None and body.dimensions > width:
            message = f"dimensions: this model has {width}, ask for 1 to {width}"
            raise RequestError(400, "invalid_value", message, "dimensions")
        asks = await self._read(body.input, body.modality, truncate=body.truncate)
        embedded = await self._runner.answer(asks)
        reply = await self._runner.on_cpu(self._embeddings_reply, body, embedded, _usage(asks, embedded))
        return Response(reply, media_type=JSON)

    async def classify(self, body: ClassifyRequest) -> Response:
        """Which label fits each picture, with probabilities, best first."""
        self._check_model(body.model)
        check_labels(body.labels, body.template, max_labels=self._config.max_labels)
        asks = await self._read(body.input, "image")
        neutral = [NEUTRAL] if body.multi_label else []
        labels = await self._labels.of([*body.labels, *neutral], body.template)
        images = await self._runner.answer(asks)
        usage = _usage(asks, [*labels, *images])
        reply = await self._runner.on_cpu(self._classify_reply, body, images, labels, usage)
        return Response(reply, media_type=JSON)

    async def _read(self, items: Sequence[Item], modality: Modality, truncate: bool = True) -> list[Ask]:
        return await self._runner.on_cpu(
            lambda: read_asks(
                items,
                modality=modality,
                max_inputs=self._config.max_inputs,
                max_image_bytes=self._config.max_image_mib * MIB,
                truncate=truncate,
            )
        )

    # ------------------------------------------------------------------------------------------------ replies

    def _embeddings_reply(self, body: EmbeddingsRequest, embedded: Sequence[Embedding], usage: Usage) -> str:
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
        self, body: ClassifyRequest, images: Sequence[Embedding], labels: Sequence[Embedding], usage: Usage
    ) -> str:
        image_ND = torch.stack([one.vector_D for one in images])
        label_LD = torch.stack([one.vector_D for one in labels[: len(body.labels)]])
        neutral_D = labels[-1].vector_D if body.multi_label else None
        scores_NL = probabilities(image_ND, label_LD, neutral_D, self._capabilities)
        best = scores_NL.topk(min(body.top_k or len(body.labels), len(body.labels)), dim=1)
        data = []
        for i, (scores, columns) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            probs = [LabelScore(label=body.labels[c], score=s) for c, s in zip(columns, scores, strict=True)]
            data.append(Classification(index=i, label=probs[0].label, probs=probs))
        return ClassifyReply(data=data, model=body.model, usage=usage).model_dump_json()


def _usage(asks: Sequence[Ask], embedded: Sequence[Embedding]) -> Usage:
    tokens = sum(one.tokens for one in embedded)
    images = sum(isinstance(ask, ImageAsk) for ask in asks)
    truncated = sum(one.truncated for one in embedded)
    return Usage(prompt_tokens=tokens, total_tokens=tokens, images=images, truncated=truncated)
