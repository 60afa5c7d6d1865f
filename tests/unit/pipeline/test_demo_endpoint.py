"""The demo's endpoint where there is nothing to serve: one line with the server's own last words."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmray.config.base import RuntimeConfig
from fmray.errors import ResourceError
from fmray.pipeline.demo_endpoint import client_of, endpoint


def test_a_run_without_a_model_is_said_at_once(tmp_path: Path) -> None:
    wanted = rf"^the endpoint did not come up: .*checkpoint.* \(whole log: {tmp_path}/serve\.log\)$"
    with (
        pytest.raises(ResourceError, match=wanted),
        endpoint(tmp_path, RuntimeConfig(), "fmray-vqa"),
    ):
        pytest.fail("nothing is served")


def test_the_client_is_openais_own() -> None:
    client = client_of("http://127.0.0.1:1")
    assert type(client).__module__.startswith("openai")
    assert str(client.base_url) == "http://127.0.0.1:1/v1/"
