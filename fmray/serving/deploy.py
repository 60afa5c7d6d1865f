"""The door of serving: a saved model behind a port, in this process or on Ray Serve."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import fsspec
import torch

from fmray.config.serving import ServeConfig
from fmray.errors import CheckpointError, require_package
from fmray.manifest import find_model_folder
from fmray.runtime.context import choose_device, stop_on_sigterm
from fmray.runtime.ports import bind

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fmray.serving.engines import Kind
    from fmray.serving.metrics import Meters, Sink
    from fmray.serving.shelf import ServedModel

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30
"""What requests in flight are given when the endpoint is told to stop."""

MODEL_TYPES: dict[str, Kind] = {
    "fmray_dual_encoder": "clip",
    "clip": "clip",
    "siglip": "clip",
    "fmray_vqa": "vqa",
    "fmray_mllm": "mllm",
}
"""What a model's config.json calls itself, and the kind of endpoint that it gets."""


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


def build_model_app(config: ServeConfig, also: Sink | None = None) -> FastAPI:
    """Load the models, warm them up, build their app: in this process or in a replica. `also` receives what is counted."""
    from fmray.serving.app import build_app
    from fmray.serving.metrics import Meters
    from fmray.serving.shelf import Shelf

    meters = Meters(also)
    torch.set_num_threads(config.runtime.threads or max(1, (os.cpu_count() or 1) // config.replicas))
    config = config.named(kind_of(config.checkpoint))
    places = {str(config.model_id): config.checkpoint, **config.more}
    shelf = Shelf([open_model(*place, config, meters) for place in places.items()], meters)
    return build_app(shelf, config, meters)


def open_model(model_id: str, location: str, config: ServeConfig, meters: Meters) -> ServedModel:
    """A saved model, loaded and warm; raises CheckpointError where there is none or its numbers are not finite."""
    from fmray.models.answering import load_answering
    from fmray.models.saved import load_dual_encoder
    from fmray.serving.batcher import Batcher
    from fmray.serving.chat_engine import AnswerEngine
    from fmray.serving.chat_loop import ChatLoop
    from fmray.serving.clip_engine import ClipEngine
    from fmray.serving.shelf import AnsweringModel, EmbeddingModel
    from fmray.serving.zero_shot import LabelVectors

    kind = kind_of(location)
    device, max_pixels = choose_device(config.runtime.device), int(config.max_image_megapixels * 1e6)
    if kind == "clip":
        clip = ClipEngine(load_dual_encoder(location, device), max_pixels=max_pixels)
        clip.warmup()
        vectors = Batcher(model_id, clip, config.batch, meters)
        return EmbeddingModel(model_id, location, clip.capabilities, vectors, LabelVectors(vectors.answer))
    with _on_disk(location) as folder:
        answers = AnswerEngine(load_answering(folder, device), kind, max_pixels=max_pixels)
    answers.warmup()
    said = ChatLoop(model_id, answers, config.batch, meters)
    return AnsweringModel(model_id, location, answers.capabilities, said)


def kind_of(location: str) -> Kind:
    """What kind of model a model, checkpoint or run folder holds; raises CheckpointError where it is none that is served."""
    folder = find_model_folder(location)
    try:
        with fsspec.open(f"{folder}/config.json", "r", encoding="utf-8") as stream:
            model_type = json.load(stream).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{location}: its config.json cannot be read: {error}") from None
    if model_type not in MODEL_TYPES:
        served = "dual encoders (CLIP, SigLIP), VQA models and multimodal LLMs"
        raise CheckpointError(f"{location}: holds a {model_type} model; what can be served are {served}")
    return MODEL_TYPES[model_type]


@contextmanager
def _on_disk(location: str) -> Iterator[str]:
    """The model's folder, for as long as it is needed; one at a URL is copied."""
    folder = find_model_folder(location)
    if "://" not in folder:
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        filesystem, path = fsspec.core.url_to_fs(folder)
        filesystem.get(f"{path.rstrip('/')}/", f"{local}/", recursive=True)
        yield local


def _serve_here(config: ServeConfig) -> None:
    import uvicorn

    with bind(config.host, config.port) as bound:  # before the model: a port in use is known at once
        config = config.named(kind_of(config.checkpoint))
        settings = uvicorn.Config(
            build_model_app(config),
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
    config = config.named(kind_of(config.checkpoint))
    name = str(config.model_id)
    # the signals after Ray, whose own handler would end the process
    with connected(config.runtime.address), stop_on_sigterm() as stop_asked:
        ray_serve.run_app(
            lambda: build_model_app(config),
            name=name,
            replicas=config.replicas,
            host=config.host,
            port=config.port,
            cpus=config.runtime.cpus_per_worker,
            gpus=config.runtime.gpus_per_worker,
        )
        try:
            logger.info("serving %s on http://%s:%d/v1 (Ray)", name, config.host, config.port)
            ray_serve.wait_while_running(name, stop_asked)
        finally:
            ray_serve.stop_app(name)
