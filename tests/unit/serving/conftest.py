"""One tiny real CLIP behind one real uvicorn, and the apps of a tiny VQA model and a tiny multimodal LLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from fmray.config.serving import ServeConfig
from fmray.serving.opening import Endpoint
from tests.endpoint import save_answering, save_tiny_checkpoint, serving
from tests.tiny_mllm import tiny_mllm
from tests.tiny_vqa import tiny_vqa

SMALL: dict[str, Any] = {"max_images": 3, "max_inputs": 2000, "max_image_mib": 1, "max_image_megapixels": 1.0}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def siglip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("siglip"), objective="siglip")


@pytest.fixture(scope="session")
def client(checkpoint: str) -> Iterator[httpx.Client]:
    """Talks to an endpoint with limits that tests can reach quickly."""
    config = ServeConfig(
        checkpoint=checkpoint, model_id="tiny", max_body_mib=4, max_image_mib=1, max_image_megapixels=1.0
    )
    with serving(Endpoint(config).app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def vqa_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_answering(tiny_vqa(seed=2), tmp_path_factory.mktemp("vqa"))


@pytest.fixture(scope="session")
def mllm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_answering(tiny_mllm(seed=3), tmp_path_factory.mktemp("mllm"))


@pytest.fixture(scope="session")
def vqa(vqa_checkpoint: str) -> FastAPI:
    """A VQA model's app, with limits that tests can reach quickly."""
    return Endpoint(ServeConfig(checkpoint=vqa_checkpoint, **SMALL)).app


@pytest.fixture(scope="session")
def mllm(mllm_checkpoint: str) -> FastAPI:
    """A multimodal LLM's, likewise."""
    return Endpoint(ServeConfig(checkpoint=mllm_checkpoint, **SMALL)).app
