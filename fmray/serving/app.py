"""The endpoint: OpenAI-shaped routes over a shelf of models. The same app in local mode and in a Ray Serve replica."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

import fmray
from fmray.config.serving import ServeConfig
from fmray.serving.border import Border, install_error_answers
from fmray.serving.chat_routes import ChatRoutes
from fmray.serving.embedding_routes import EmbeddingRoutes
from fmray.serving.metrics import Meters
from fmray.serving.model_routes import ModelRoutes
from fmray.serving.page_routes import PageRoutes
from fmray.serving.ranking_routes import RankingRoutes
from fmray.serving.schemas import ErrorReply
from fmray.serving.shelf import Shelf

MIB = 2**20
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 404, 413, 415, 429, 500, 503, 504)
}


def build_app(shelf: Shelf, config: ServeConfig, meters: Meters) -> FastAPI:
    """The ASGI app of some warm models; ends their threads when it ends."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        shelf.close()

    app = FastAPI(title="fmray", version=fmray.__version__, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Border, max_body=config.max_body_mib * MIB)
    install_error_answers(app)
    router = APIRouter(responses=ERRORS)
    for routes in (
        EmbeddingRoutes(shelf, config),
        RankingRoutes(shelf, config),
        ChatRoutes(shelf, config, meters),
        ModelRoutes(shelf, config, meters),
        PageRoutes(config),
    ):
        routes.add_to(router)
    app.include_router(router)
    return app
