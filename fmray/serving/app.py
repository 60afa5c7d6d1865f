"""The endpoint: OpenAI-shaped routes over an engine. The same app in local mode and in a Ray Serve replica."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

import fmray
from fmray.config.serving import ServeConfig
from fmray.serving.asks import Ask
from fmray.serving.border import Border, install_error_answers
from fmray.serving.chat_engine import ChatEngine
from fmray.serving.chat_routes import ChatRoutes
from fmray.serving.clip_engine import Embedding, EmbeddingEngine
from fmray.serving.embedding_routes import EmbeddingRoutes
from fmray.serving.engines import EngineRunner
from fmray.serving.schemas import ErrorReply

MIB = 2**20
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 404, 413, 415, 500)
}


def build_embedding_app(engine: EmbeddingEngine, config: ServeConfig) -> FastAPI:
    """The ASGI app of a warm dual encoder."""
    runner: EngineRunner[Ask, Embedding] = EngineRunner(engine)
    return _build_app(EmbeddingRoutes(runner, engine.capabilities, config), runner, config)


def build_chat_app(engine: ChatEngine, config: ServeConfig) -> FastAPI:
    """The ASGI app of a warm model that answers about pictures."""
    runner = EngineRunner(engine)
    return _build_app(ChatRoutes(runner, engine.capabilities, config), runner, config)


def _build_app(
    routes: EmbeddingRoutes | ChatRoutes, runner: EngineRunner[Any, Any], config: ServeConfig
) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        runner.close()

    app = FastAPI(title="fmray", version=fmray.__version__, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Border, max_body=config.max_body_mib * MIB)
    install_error_answers(app)
    router = APIRouter(responses=ERRORS)
    routes.add_to(router)
    app.include_router(router)
    return app
