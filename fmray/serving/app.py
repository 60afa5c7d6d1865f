"""The endpoint: OpenAI-shaped routes over a shelf of models. The same app in local mode and in a Ray Serve replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

import fmray
from fmray.config.serving import ServeConfig
from fmray.serving.api_document import DESCRIPTION, error_replies, install_document, short_names
from fmray.serving.border import Border, install_error_answers
from fmray.serving.chat_routes import ChatRoutes
from fmray.serving.docs_page import DocsRoutes
from fmray.serving.embedding_routes import EmbeddingRoutes
from fmray.serving.fetch import Fetcher
from fmray.serving.finished import Finished, log_finished
from fmray.serving.index_shelf import IndexShelf
from fmray.serving.keys import Access
from fmray.serving.metrics import Meters
from fmray.serving.model_routes import ModelRoutes
from fmray.serving.page_routes import PageRoutes
from fmray.serving.ranking_routes import RankingRoutes
from fmray.serving.rate_limits import Ledger, RateLimits
from fmray.serving.reading import Reader
from fmray.serving.search_routes import SearchRoutes, ServedEncoders, query_encoder
from fmray.serving.shelf import Shelf
from fmray.serving.tracing import Tracer, open_tracer

MIB = 2**20


def build_app(shelf: Shelf, config: ServeConfig, meters: Meters, ledger: Ledger | None = None) -> FastAPI:
    """The ASGI app of some warm models; ends their threads when it ends.

    ledger: where limits are counted, over all replicas; None: in this process. Raises ConfigError for a key file that cannot be
    read, CheckpointError or DataError for an index that cannot be searched, MissingExtra for traces without OpenTelemetry.
    """
    fetcher = Fetcher(
        config.fetch,
        config.max_image_mib * MIB,
        count=lambda outcome: meters.count("fmray_fetches_total", outcome=outcome),
    )
    reader, tracer = Reader(config, fetcher), open_tracer(config.trace)
    indexes = IndexShelf(config.indexes, served=ServedEncoders(shelf, lambda model: model.capabilities.dim))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        indexes.start()
        await limits.ledger.start()
        yield
        indexes.close()
        shelf.close()
        fetcher.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="fmray",
        version=fmray.__version__,
        description=DESCRIPTION,
        redirect_slashes=False,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load their scripts from elsewhere
        redoc_url=None,
    )
    limits = RateLimits(
        ledger, requests=config.access.requests_per_minute, inputs=config.access.inputs_per_minute
    )
    app.add_middleware(Border, limits=limits, **_border(config, meters, tracer))
    install_error_answers(app)
    router = APIRouter(responses=error_replies())
    for routes in (
        EmbeddingRoutes(shelf, reader, max_labels=config.max_labels),
        RankingRoutes(shelf, reader, max_inputs=config.max_inputs),
        ChatRoutes(shelf, reader, meters),
        SearchRoutes(
            ServedEncoders(shelf, query_encoder), indexes, max_image_bytes=config.max_image_mib * MIB
        ),
        ModelRoutes(shelf, config, meters),
        PageRoutes(config),
        DocsRoutes(app),
    ):
        routes.add_to(router)
    app.include_router(router)
    app.include_router(short_names(router))
    install_document(app, guarded=config.access.key_file is not None)
    return app


def _border(config: ServeConfig, meters: Meters, tracer: Tracer | None) -> dict[str, Any]:
    """The border's settings: who may ask, how much, by when, and what is noted of it."""
    access = config.access

    def finished(request: Finished) -> None:
        meters.count("fmray_requests_total", route=request.route, code=str(request.status))
        meters.observe("fmray_request_seconds", request.seconds, route=request.route)
        if access.log_requests:
            log_finished(request)
        if tracer is not None:
            tracer.finished(request)

    return {
        "max_body": config.max_body_mib * MIB,
        "access": Access(access.key_file) if access.key_file is not None else None,
        "deadline_seconds": config.batch.deadline_seconds,
        "body_seconds": access.body_seconds,
        "address_header": access.address_header,
        "most_inside": config.batch.queue_items * len(config.places),
        # of which model it would have been asked is not known: its body was not read
        "crowded": lambda: meters.count("fmray_rejected_total", model="-", reason="overloaded"),
        "finished": finished,
    }
