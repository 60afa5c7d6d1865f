"""From saved models to a warm endpoint: what a folder holds, the shelf, the app, and the change of a model that runs."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
import torch
from fastapi import FastAPI
from transformers import PreTrainedModel

from fmray.config.serving import ServeConfig
from fmray.errors import CheckpointError
from fmray.manifest import find_model_folder
from fmray.models.answering import load_answering
from fmray.models.packed import pack_for_answers
from fmray.models.saved import load_dual_encoder
from fmray.runtime.context import choose_device
from fmray.serving.app import build_app
from fmray.serving.batcher import Batcher
from fmray.serving.chat_engine import AnswerEngine
from fmray.serving.chat_loop import ChatLoop
from fmray.serving.clip_engine import ClipEngine, EmbeddingEngine
from fmray.serving.engines import Kind
from fmray.serving.index_store import checkpoint_hash
from fmray.serving.library import Library
from fmray.serving.metrics import Meters, Sink
from fmray.serving.rate_limits import Ledger
from fmray.serving.shelf import AnsweringModel, EmbeddingModel, ServedModel, Shelf
from fmray.serving.zero_shot import LabelVectors

MODEL_TYPES: dict[str, Kind] = {
    "fmray_dual_encoder": "clip",
    "clip": "clip",
    "siglip": "clip",
    "fmray_vqa": "vqa",
    "fmray_mllm": "mllm",
}
"""What a model's config.json calls itself, and the kind of endpoint that it gets."""


Engine = EmbeddingEngine | AnswerEngine


class Endpoint:
    """An app and the models behind it, in this process or in a replica. Raises CheckpointError where a model cannot be served."""

    def __init__(self, config: ServeConfig, also: Sink | None = None, ledger: Ledger | None = None) -> None:
        torch.set_num_threads(config.runtime.threads or max(1, (os.cpu_count() or 1) // config.replicas))
        self.config = config.named(kind_of(config.checkpoint))
        self._meters = Meters(also)
        self._changing = asyncio.Lock()
        self.shelf = Shelf(
            [
                served_model(name, place, open_engine(place, self.config), self.config, self._meters)
                for name, place in self.config.places.items()
            ],
            self._meters,
            self._library(),
        )
        self.app: FastAPI = build_app(self.shelf, self.config, self._meters, ledger)

    def _library(self) -> Library | None:
        if self.config.library is None:
            return None

        def open_model(name: str, place: str) -> ServedModel:
            return served_model(name, place, open_engine(place, self.config), self.config, self._meters)

        return Library(
            self.config.library, self.config.library_models, open_model, lambda model: self.shelf.end(model)
        )

    async def reconfigure(self, changes: Mapping[str, Any]) -> None:
        """Serve what the changed configuration says, without dropping a request: new models are loaded and warmed beside the old.

        changes: keys among `config.serving.CHANGEABLE`. Raises ConfigError or CheckpointError, and then nothing has changed.
        """
        async with self._changing:
            before, after = self.config, self.config.changed(changes)
            served = {model.id: model for model in self.shelf.models}
            loop = asyncio.get_running_loop()
            models = []
            for name, place in after.places.items():
                engine: Engine | None = None
                if before.places.get(name) == place:
                    if before.batch == after.batch:
                        continue
                    engine = served[name].engine
                if engine is None:
                    engine = await loop.run_in_executor(None, open_engine, place, after)
                models.append(served_model(name, place, engine, after, self._meters))
            for model in models:
                self.shelf.put(model)
            for name in before.places.keys() - after.places.keys():
                self.shelf.take(name)
            self.config = after

    async def check(self) -> None:
        """Raises RequestError(503) where a model no longer answers."""
        await self.shelf.check_ready()


_ONE_AT_A_TIME = threading.Lock()
"""transformers patches torch's initialisers and its own tying of weights while a model is loaded: two that load at the same time
leave them patched, and every model after them without its tied weights."""


def open_engine(location: str, config: ServeConfig) -> Engine:
    """A saved model, loaded and warm; raises CheckpointError where there is none or its numbers are not finite."""
    with _ONE_AT_A_TIME:
        return _opened(location, config)


def _opened(location: str, config: ServeConfig) -> Engine:
    kind = kind_of(location)
    device, max_pixels = choose_device(config.runtime.device), int(config.max_image_megapixels * 1e6)
    engine: Engine
    if kind == "clip":
        loaded = load_dual_encoder(location, device)
        _pack_towers(loaded.model)
        engine = ClipEngine(loaded, max_pixels=max_pixels)
    else:
        with _on_disk(location) as folder:
            answering = load_answering(folder, device)
        _pack_towers(answering.model)
        engine = AnswerEngine(answering, kind, max_pixels=max_pixels)
    engine.warmup()
    return engine


def _pack_towers(model: PreTrainedModel) -> None:
    """What looks and what reads questions; what speaks lays its matrices out by itself (`models.decoding`)."""
    for name in ("vision", "text"):
        if (tower := getattr(model, name, None)) is not None:
            pack_for_answers(tower)


def served_model(
    name: str, location: str, engine: Engine, config: ServeConfig, meters: Meters
) -> ServedModel:
    """An engine with what makes batches of requests for it."""
    if isinstance(engine, AnswerEngine):
        loop = ChatLoop(name, engine, config.batch, meters)
        return AnsweringModel(name, location, engine, loop)
    batcher = Batcher(name, engine, config.batch, meters)
    content = checkpoint_hash(location) if config.indexes else None

    def count(hits: int, misses: int) -> None:
        meters.count("fmray_cache_hits_total", hits, model=name)
        meters.count("fmray_cache_misses_total", misses, model=name)

    labels = LabelVectors(batcher.answer, count=count)
    return EmbeddingModel(name, location, engine, batcher, labels, content)


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
