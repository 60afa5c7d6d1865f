"""Routes about the endpoint itself: whether it lives, whether its models answer, what they are, what was counted."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

import fmray
from fmray.config.serving import ServeConfig
from fmray.serving.metrics import Meters
from fmray.serving.schemas import Health, ModelFacts, ModelList, ModelObject, Ready, Version
from fmray.serving.shelf import EmbeddingModel, ServedModel, Shelf

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class ModelRoutes:
    """`/health`, `/ready`, `/version`, `/v1/models`, `/metrics`."""

    def __init__(self, shelf: Shelf, config: ServeConfig, meters: Meters) -> None:
        self._shelf, self._config, self._meters = shelf, config, meters

    def add_to(self, router: APIRouter) -> None:
        """These routes."""
        router.get("/health")(self.health)
        router.get("/ready")(self.ready)
        router.get("/version")(self.version)
        told: dict[int | str, dict[str, Any]] = {
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
        }
        router.get("/metrics", response_class=Response, responses=told)(self.metrics)
        router.get("/v1/models")(self.list_models)
        router.get("/v1/models/{model_id:path}")(self.get_model)

    async def health(self) -> Health:
        """The process answers."""
        return Health()

    async def ready(self) -> Ready:
        """A synthetic item went through every model just now; else 503."""
        await self._shelf.check_ready()
        return Ready(models=[model.id for model in self._shelf.models])

    async def version(self) -> Version:
        """Of fmray."""
        return Version(version=fmray.__version__)

    async def metrics(self) -> Response:
        """What this process has counted, for Prometheus."""
        return Response(self._meters.text(), media_type=PROMETHEUS)

    async def list_models(self) -> ModelList:
        """The served models."""
        loaded = [self._object(model) for model in self._shelf.models]
        return ModelList(data=[*loaded, *(ModelObject(id=name) for name in self._shelf.unloaded)])

    async def get_model(self, model_id: str) -> ModelObject:
        """What a served model can do."""
        return self._object(await self._shelf.model(model_id))

    def _object(self, model: ServedModel) -> ModelObject:
        config, capabilities = self._config, model.capabilities
        embeds = isinstance(model, EmbeddingModel)
        limits: dict[str, float] = {"inputs": config.max_inputs}
        limits |= {"labels": config.max_labels} if embeds else {"images": config.max_images}
        facts = ModelFacts(
            kind=capabilities.kind,
            modalities=list(capabilities.modalities),
            output=capabilities.output,
            routes=list(model.routes),
            dim=model.capabilities.dim if isinstance(model, EmbeddingModel) else None,
            max_length=capabilities.max_tokens,
            max_answer_tokens=None if isinstance(model, EmbeddingModel) else model.capabilities.answer_tokens,
            image_size=capabilities.image_size,
            limits={
                **limits,
                "body_mib": config.max_body_mib,
                "image_mib": config.max_image_mib,
                "image_megapixels": config.max_image_megapixels,
            },
        )
        return ModelObject(id=model.id, created=model.created, fmray=facts)
