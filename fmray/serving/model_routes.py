"""Routes that every endpoint has: health, the served model, and a plain word where a route needs another kind of model."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

from fastapi import APIRouter

from fmray.config.serving import ServeConfig
from fmray.errors import RequestError
from fmray.serving.engines import KINDS, Capabilities
from fmray.serving.schemas import Health, ModelFacts, ModelList, ModelObject

ROUTES = {
    "/v1/embeddings": "clip",
    "/v1/classify": "clip",
    "/v1/chat/completions": "vqa or mllm",
}
"""Every route that asks a model, and the kinds that can answer it."""


class ModelRoutes:
    """One model under its name."""

    def __init__(
        self,
        capabilities: Capabilities,
        config: ServeConfig,
        *,
        routes: Sequence[str],
        limits: dict[str, float],
        dim: int | None = None,
        max_answer_tokens: int | None = None,
    ) -> None:
        self.model_id = config.named(capabilities.kind).model_id
        self._kind = capabilities.kind
        self._routes = tuple(routes)
        self._created = int(time.time())
        self._facts = ModelFacts(
            kind=capabilities.kind,
            modalities=list(capabilities.modalities),
            output=capabilities.output,
            routes=list(routes),
            dim=dim,
            max_length=capabilities.max_tokens,
            max_answer_tokens=max_answer_tokens,
            image_size=capabilities.image_size,
            limits={
                **limits,
                "body_mib": config.max_body_mib,
                "image_mib": config.max_image_mib,
                "image_megapixels": config.max_image_megapixels,
            },
        )

    def add_to(self, router: APIRouter) -> None:
        """These routes, and a refusal for each that another kind of model would answer."""
        router.get("/health")(self.health)
        router.get("/v1/models")(self.list_models)
        router.get("/v1/models/{model_id:path}")(self.get_model)
        for path in ROUTES.keys() - set(self._routes):
            router.post(path, include_in_schema=False)(self._refusal(path))

    async def health(self) -> Health:
        """The process answers."""
        return Health()

    async def list_models(self) -> ModelList:
        """The served model, in a list."""
        return ModelList(data=[await self.get_model(str(self.model_id))])

    async def get_model(self, model_id: str) -> ModelObject:
        """What the served model can do."""
        self.check(model_id)
        return ModelObject(id=model_id, created=self._created, fmray=self._facts)

    def check(self, asked: str) -> None:
        """Raises RequestError(404) where a request asks for another model."""
        if asked != self.model_id:
            message = f"the model {asked[:100]!r} is not served here; this is {self.model_id!r}"
            raise RequestError(404, "model_not_found", message, "model")

    def _refusal(self, path: str) -> Callable[[], Awaitable[None]]:
        message = (
            f"{path} needs a model of kind {ROUTES[path]}; {self.model_id!r} is {KINDS[self._kind]}: "
            f"ask {' or '.join(self._routes)}"
        )

        async def refuse() -> None:
            raise RequestError(404, "route_not_served", message)

        return refuse
