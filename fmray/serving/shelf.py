"""The models of one endpoint, by the names under which clients ask for them; replaced one by one while requests run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fmray.errors import RequestError
from fmray.serving.asks import Ask
from fmray.serving.batcher import Batcher
from fmray.serving.chat_engine import AnswerCapabilities, AnswerEngine
from fmray.serving.chat_loop import ChatLoop
from fmray.serving.clip_engine import Embedding, EmbeddingCapabilities, EmbeddingEngine
from fmray.serving.engines import KINDS
from fmray.serving.metrics import Meters
from fmray.serving.zero_shot import LabelVectors

if TYPE_CHECKING:
    from fmray.serving.library import Library

EMBEDDING_ROUTES = ("/v1/embeddings", "/v1/classify", "/v1/rerank", "/v1/score")
ANSWER_ROUTES = ("/v1/chat/completions",)
PROBE_SECONDS = 10.0
"""What a synthetic item may take before a model counts as not ready."""


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """A dual encoder, warm."""

    id: str
    checkpoint: str
    engine: EmbeddingEngine
    batcher: Batcher[Ask, Embedding]
    labels: LabelVectors
    content_hash: str | None = None
    """What an index says of the model that made it; None where no index is served."""
    created: int = field(default_factory=lambda: int(time.time()))
    routes: tuple[str, ...] = EMBEDDING_ROUTES

    @property
    def capabilities(self) -> EmbeddingCapabilities:
        """The engine's."""
        return self.engine.capabilities

    @property
    def answers(self) -> Batcher[Ask, Embedding]:
        """What takes its asks."""
        return self.batcher


@dataclass(frozen=True, slots=True)
class AnsweringModel:
    """A VQA model or a multimodal LLM, warm."""

    id: str
    checkpoint: str
    engine: AnswerEngine
    loop: ChatLoop
    created: int = field(default_factory=lambda: int(time.time()))
    routes: tuple[str, ...] = ANSWER_ROUTES

    @property
    def capabilities(self) -> AnswerCapabilities:
        """The engine's."""
        return self.engine.capabilities

    @property
    def answers(self) -> ChatLoop:
        """What takes its conversations."""
        return self.loop


ServedModel = EmbeddingModel | AnsweringModel


class Shelf:
    """Models by name."""

    def __init__(self, models: Sequence[ServedModel], meters: Meters, library: Library | None = None) -> None:
        self._library = library
        self._meters = meters
        self._models: dict[str, ServedModel] = {model.id: model for model in models}
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def models(self) -> list[ServedModel]:
        """All that are loaded, the first one first."""
        return [*self._models.values(), *(self._library.loaded if self._library is not None else ())]

    @property
    def unloaded(self) -> list[str]:
        """Names of models that are loaded when somebody asks for them."""
        loaded = {model.id for model in self.models}
        return [name for name in (self._library.names if self._library else ()) if name not in loaded]

    async def model(self, asked: str) -> ServedModel:
        """The model of that name, loaded where it is the library's; raises RequestError(404)."""
        if asked in self._models:
            return self._models[asked]
        found = await self._library.model(asked) if self._library is not None else None
        if found is None:
            served = ", ".join(repr(name) for name in [*self._models, *self.unloaded])
            message = f"the model {asked[:100]!r} is not served here; there is {served}"
            raise RequestError(404, "model_not_found", message, "model")
        return found

    async def embedding(self, asked: str, route: str) -> EmbeddingModel:
        """The dual encoder of that name; raises RequestError(404) where there is none or it is another kind of model."""
        model = await self.model(asked)
        if isinstance(model, EmbeddingModel):
            return model
        raise self._wrong_kind(model, route, "clip")

    async def answering(self, asked: str, route: str) -> AnsweringModel:
        """The model of that name that answers; raises RequestError(404), likewise."""
        model = await self.model(asked)
        if isinstance(model, AnsweringModel):
            return model
        raise self._wrong_kind(model, route, "vqa or mllm")

    def _wrong_kind(self, model: ServedModel, route: str, kinds: str) -> RequestError:
        message = (
            f"{route} needs a model of kind {kinds}; {model.id!r} is {KINDS[model.capabilities.kind]}: "
            f"ask {' or '.join(model.routes)}"
        )
        return RequestError(404, "route_not_served", message, "model")

    async def check_ready(self) -> None:
        """A synthetic item goes through each model; raises RequestError(503) that names the one that does not answer."""
        for model in self.models:
            started = time.monotonic()
            try:
                await model.answers.check(asyncio.get_running_loop().time() + PROBE_SECONDS)
            except RequestError as error:
                admission = model.answers.admission
                full = error.status in (429, 504) and not admission.closed
                if full and admission.last_answer > started - PROBE_SECONDS:  # full of work is not broken
                    continue
                self._meters.gauge("fmray_ready", 0, model=model.id)
                message = f"the model {model.id!r} does not answer: {error.code}"
                raise RequestError(503, "not_ready", message, retry_after=5.0) from None
            self._meters.gauge("fmray_ready", 1, model=model.id)

    def put(self, model: ServedModel) -> None:
        """Serve this one under its name from now on; the one before answers what it has and ends. Inside the event loop."""
        before = self._models.get(model.id)
        self._models[model.id] = model
        if before is not None:
            self.end(before)

    def take(self, model_id: str) -> None:
        """Serve it no more: it answers what it has and ends. Inside the event loop."""
        self.end(self._models.pop(model_id))

    def end(self, model: ServedModel) -> None:
        """A model that is on no shelf any more answers what it has, and its threads end."""
        leaving = asyncio.get_running_loop().create_task(_drain(model))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    def close(self) -> None:
        """End every model's threads."""
        for model in self.models:
            model.answers.close()


async def _drain(model: ServedModel) -> None:
    await model.answers.drained()
    model.answers.close()
