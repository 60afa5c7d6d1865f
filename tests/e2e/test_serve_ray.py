"""An application on Ray Serve while people ask it: a new checkpoint, a killed replica, replicas that come and go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from fmray.runtime.ports import free_port
from fmray.serving.deploy import app
from tests.endpoint import another_checkpoint, save_tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]

NAME = "tiny"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return (
        save_tiny_checkpoint(tmp_path_factory.mktemp("one")),
        another_checkpoint(tmp_path_factory.mktemp("two")),
    )


@pytest.fixture(scope="module")
def url(ray_session: None) -> Iterator[str]:
    from ray import serve
    from ray.serve.config import ProxyLocation

    port = free_port()
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def deploy(args: dict[str, Any], **options: Any) -> None:
    """As `serve deploy` does it: the builder with its arguments, the file's own options over it."""
    from ray import serve

    application = app(
        {"model_id": NAME, "runtime": {"kind": "ray", "threads": 1, "cpus_per_worker": 0.5}, **args}
    )
    application = application._bound_deployment.options(**options).bind()
    serve.run(application, name=NAME, route_prefix="/")


class Asking:
    """Clients that ask without end, retrying as the unmodified openai client does."""

    def __init__(self, url: str, clients: int) -> None:
        self.vectors: list[tuple[float, list[float]]] = []
        self.errors: list[str] = []
        self._going = True
        self._threads = [threading.Thread(target=self._ask, args=(url,)) for _ in range(clients)]

    def _ask(self, url: str) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", timeout=30)
        while self._going:
            try:
                reply = client.embeddings.create(model=NAME, input="red")
                self.vectors.append((time.monotonic(), reply.data[0].embedding))
            except openai.OpenAIError as error:
                self.errors.append(repr(error))
            time.sleep(0.01)

    @contextmanager
    def on(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._going = False
            for thread in self._threads:
                thread.join(60)


def vector(url: str) -> list[float]:
    reply = httpx.post(f"{url}/v1/embeddings", json={"model": NAME, "input": "red"}, timeout=30)
    assert reply.status_code == 200, reply.text
    numbers: list[float] = reply.json()["data"][0]["embedding"]
    return numbers


def near(one: list[float], other: list[float]) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-5


def test_a_new_checkpoint_and_new_code_under_load_lose_no_request(
    url: str, checkpoints: tuple[str, str]
) -> None:
    one, two = checkpoints
    deploy({"checkpoint": one}, num_replicas=2, user_config={"checkpoint": one})
    first, asking = vector(url), Asking(url, clients=4)
    with asking.on():
        time.sleep(1)
        deploy({"checkpoint": one}, num_replicas=2, user_config={"checkpoint": two})
        time.sleep(1)
        second = vector(url)
        deploy({"checkpoint": one, "max_inputs": 7}, num_replicas=2, user_config={"checkpoint": one})
        time.sleep(1)
    assert not asking.errors
    assert len(asking.vectors) > 100
    assert not near(first, second)
    assert all(near(each, first) or near(each, second) for _, each in asking.vectors)
    assert near(asking.vectors[-1][1], first)
    reply = httpx.post(f"{url}/v1/embeddings", json={"model": NAME, "input": ["a"] * 8})
    assert reply.json()["error"]["code"] == "too_many_inputs", "the new arguments are in force"


def test_a_killed_replica_under_load_costs_a_retrying_client_nothing(
    url: str, checkpoints: tuple[str, str]
) -> None:
    import os
    import signal

    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    deploy({"checkpoint": checkpoints[0]}, num_replicas=2)
    expected, asking = vector(url), Asking(url, clients=4)

    def replicas() -> list[Any]:
        found = list_actors(address, filters=[("state", "=", "ALIVE")], detail=True)
        return [each for each in found if f"SERVE_REPLICA::{NAME}#" in (each.name or "")]

    with asking.on():
        time.sleep(1)
        before = {each.actor_id for each in replicas()}
        assert len(before) == 2
        os.kill(replicas()[0].pid, signal.SIGKILL)
        killed_at, deadline = time.monotonic(), time.monotonic() + 60
        while time.monotonic() < deadline:
            now = {each.actor_id for each in replicas()}
            if len(now) == 2 and now != before:
                break
            time.sleep(0.5)
        time.sleep(1)
    assert ray.is_initialized()
    assert now != before, "a new one has come"
    assert not asking.errors
    assert sum(at > killed_at for at, _ in asking.vectors) > 20, "the other one went on"
    assert all(near(each, expected) for _, each in asking.vectors)


def test_what_is_counted_reaches_rays_exporter_and_metrics(url: str, checkpoints: tuple[str, str]) -> None:
    import ray

    deploy({"checkpoint": checkpoints[0]}, num_replicas=1)
    for _ in range(3):
        vector(url)
    own = httpx.get(f"{url}/metrics").text
    assert 'fmray_items_total{model="tiny"}' in own
    node = ray.nodes()[0]
    exporter = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, text = time.monotonic() + 40, ""
    while "fmray_items_total" not in text and time.monotonic() < deadline:
        time.sleep(1)
        text = httpx.get(exporter).text
    lines = [line for line in text.splitlines() if "fmray_items_total{" in line and 'model="tiny"' in line]
    assert any('deployment="Model"' in line and float(line.rsplit(" ", 1)[1]) >= 3 for line in lines), lines
