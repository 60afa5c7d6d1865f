"""One tiny real CLIP behind one real uvicorn for all serving tests."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from fmray.config.schema import ServeConfig
from fmray.serving.deploy import build_clip_app
from tests.endpoint import save_tiny_checkpoint, serving


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
    with serving(build_clip_app(config)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
