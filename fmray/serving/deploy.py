"""The door of serving: a saved model behind a port, in this process or on Ray Serve."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

from fmray.config.schema import ServeConfig
from fmray.errors import require_package
from fmray.manifest import find_model_folder
from fmray.runtime.context import choose_device, stop_on_sigterm
from fmray.runtime.ports import bind

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30
"""What requests in flight are given when the endpoint is told to stop."""


def serve(config: ServeConfig) -> None:
    """Serve `config.checkpoint` until SIGTERM or SIGINT, then end cleanly.

    May raise MissingExtra, CheckpointError or ResourceError (port in use, cluster too small) before that.
    """
    require_package("fastapi", "serve", "serving")
    require_package("uvicorn", "serve", "serving")
    if config.runtime.kind == "ray":
        require_package("ray", "ray", "runtime.kind=ray")
        _serve_on_ray(config)
    else:
        _serve_here(config)


def build_clip_app(config: ServeConfig) -> FastAPI:
    """Load the model, warm it up, build its app: in this process or in a replica."""
    from fmray.models.saved import load_dual_encoder
    from fmray.serving.app import build_app
    from fmray.serving.engines import ClipEngine

    torch.set_num_threads(config.runtime.threads or max(1, (os.cpu_count() or 1) // config.replicas))
    loaded = load_dual_encoder(config.checkpoint, choose_device(config.runtime.device))
    engine = ClipEngine(loaded, max_pixels=int(config.max_image_megapixels * 1e6))
    engine.warmup()
    return build_app(engine, config)


def _serve_here(config: ServeConfig) -> None:
    import uvicorn

    with bind(config.host, config.port) as bound:  # before the model: a port in use is known at once
        settings = uvicorn.Config(
            build_clip_app(config),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        logger.info("serving %s on http://%s:%d/v1", config.model_id, config.host, config.port)
        with (
            stop_on_sigterm()
        ):  # uvicorn raises the signal again once it has drained: our handler lets that pass
            uvicorn.Server(settings).run(sockets=[bound])


def _serve_on_ray(config: ServeConfig) -> None:
    from fmray.runtime import ray_serve
    from fmray.runtime.ray_cluster import connected

    # found once, as an absolute path: replicas have another working folder, and must not differ in what they load
    config = config.replace(checkpoint=find_model_folder(config.checkpoint))
    # the signals after Ray, whose own handler would end the process
    with connected(config.runtime.address), stop_on_sigterm() as stop_asked:
        ray_serve.run_app(
            lambda: build_clip_app(config),
            name=config.model_id,
            replicas=config.replicas,
            host=config.host,
            port=config.port,
            cpus=config.runtime.cpus_per_worker,
            gpus=config.runtime.gpus_per_worker,
        )
        try:
            logger.info("serving %s on http://%s:%d/v1 (Ray)", config.model_id, config.host, config.port)
            ray_serve.wait_while_running(config.model_id, stop_asked)
        finally:
            ray_serve.stop_app(config.model_id)
