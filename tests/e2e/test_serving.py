"""The door of serving as people use it: a process of its own, the unmodified openai client, curl, and Ray Serve."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from fmray.config.schema import RuntimeConfig
from fmray.config.serving import ServeConfig
from fmray.runtime.ports import free_port
from fmray.serving.deploy import serve
from tests.endpoint import data_url, picture, save_tiny_checkpoint

RED, BLUE = data_url(picture("red")), data_url(picture("blue", kind="JPEG"), "image/jpeg")

DOOR = """
import sys
from fmray.config.serving import ServeConfig
from fmray.serving.deploy import serve
serve(ServeConfig.model_validate_json(sys.argv[1]))
print("ended")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"))


def start(config: ServeConfig) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DOOR, config.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_up(url: str, seconds: float, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended: {process.communicate()[1]}")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"{url} did not come up in {seconds} s")


@pytest.fixture(scope="module")
def url(checkpoint: str) -> Iterator[str]:
    """`serve` in a process of its own; at the end SIGTERM, on which it must end cleanly."""
    config = ServeConfig(checkpoint=checkpoint, model_id="tiny", port=free_port())
    url = f"http://127.0.0.1:{config.port}"
    with start(config) as process:
        try:
            wait_until_up(url, 60, process)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "ended\n"), err


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="not-needed", max_retries=0)


# --------------------------------------------------------------------------------------------- openai's client


def test_embeddings_in_both_encodings(client: openai.OpenAI) -> None:
    value = ["a red heart", RED, BLUE]
    by_default = client.embeddings.create(model="tiny", input=value)  # base64 on the wire
    as_floats = client.embeddings.create(model="tiny", input=value, encoding_format="float")
    assert [item.index for item in by_default.data] == [0, 1, 2]
    for one, other in zip(by_default.data, as_floats.data, strict=True):
        assert len(one.embedding) == 8
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
        assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-5)
    assert by_default.usage.prompt_tokens == 12
    assert by_default.model == "tiny"
    assert len(client.embeddings.create(model="tiny", input="red", dimensions=4).data[0].embedding) == 4


def test_eight_clients_get_what_one_gets(url: str) -> None:
    questions = [[f"text {i}", RED if i % 2 else BLUE, "red " * (i % 4 + 1)] for i in range(32)]

    def ask(value: list[str]) -> list[list[float]]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
            return [item.embedding for item in client.embeddings.create(model="tiny", input=value).data]

    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, questions))
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a == pytest.approx(b, abs=1e-6)


# -------------------------------------------------------------------------------------------------------- curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(url: str) -> None:
    body = json.dumps({"model": "tiny", "input": [RED], "encoding_format": "base64"})
    command = [
        "curl",
        "-sS",
        "-i",
        f"{url}/v1/embeddings",
        "-H",
        "content-type: application/json",
        "-d",
        "@-",
    ]
    done = subprocess.run(command, input=body, capture_output=True, text=True, timeout=30, check=True)
    head, _, reply = done.stdout.partition("\n\n")
    assert "200 OK" in head
    assert "x-request-id: req_" in head
    raw = base64.b64decode(json.loads(reply)["data"][0]["embedding"])
    assert sum(x * x for x in struct.unpack("<8f", raw)) == pytest.approx(1, abs=1e-5)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("size_told", [True, False])
def test_curl_sends_too_much(url: str, size_told: bool) -> None:
    chunked = [] if size_told else ["-H", "transfer-encoding: chunked"]
    command = ["curl", "-sS", f"{url}/v1/embeddings", "-H", "content-type: application/json", *chunked]
    done = subprocess.run(
        [*command, "--data-binary", "@-"], input=b" " * (21 * 2**20), capture_output=True, timeout=60
    )
    assert json.loads(done.stdout)["error"]["code"] == "request_too_large", done.stderr


# --------------------------------------------------------------------------------------------------- processes


def test_sigterm_lets_a_request_in_flight_be_answered(checkpoint: str) -> None:
    """Whoever comes then finds the door closed, which every client takes for a reason to try another replica."""
    config = ServeConfig(checkpoint=checkpoint, model_id="tiny", port=free_port())
    body = json.dumps({"model": "tiny", "input": "red"}).encode()
    with start(config) as process:
        wait_until_up(f"http://127.0.0.1:{config.port}", 60, process)
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        with socket.create_connection(("127.0.0.1", config.port), timeout=20) as raw:
            raw.sendall(head.encode() + b"\r\n\r\n" + body[:10])
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            time.sleep(1.0)
            assert process.poll() is None, "it waits"
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.1", config.port), timeout=5)
            raw.sendall(body[10:])
            answer = b""
            while part := raw.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200 OK"), answer
        assert b"connection: close" in answer
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "ended\n"), err


def test_sigint_ends_it_too_and_a_taken_port_is_one_line(checkpoint: str) -> None:
    config = ServeConfig(checkpoint=checkpoint, port=free_port())
    with start(config) as first:
        wait_until_up(f"http://127.0.0.1:{config.port}", 60, first)
        with start(config) as second:
            _, err = second.communicate(timeout=60)
        assert err.splitlines()[-1].startswith("fmray.errors.ResourceError: port")
        first.send_signal(signal.SIGINT)
        out, err = first.communicate(timeout=30)
    assert (first.returncode, out) == (0, "ended\n"), err


@pytest.mark.ray
@pytest.mark.slow
def test_ray_serve_answers_as_local_mode_does(ray_session: None, checkpoint: str, url: str) -> None:
    """The same requests to both; `serve` blocks this thread until the other one has asked and sends SIGTERM."""
    runtime = RuntimeConfig(kind="ray", cpus_per_worker=1)
    config = ServeConfig(
        checkpoint=checkpoint, model_id="tiny", port=free_port(), replicas=2, runtime=runtime
    )
    on_ray = f"http://127.0.0.1:{config.port}"
    questions: list[tuple[str, dict[str, object]]] = [
        ("/v1/embeddings", {"model": "tiny", "input": ["red", RED, BLUE]}),
        ("/v1/embeddings", {"model": "tiny", "input": [f"text {i}" for i in range(100)]}),
        ("/v1/classify", {"model": "tiny", "input": RED, "labels": ["red", "blue"]}),
        ("/v1/embeddings", {"model": "tiny", "input": ["red", "data:image/png;base64,AAAA"]}),
        ("/v1/embeddings", {"model": "other", "input": "red"}),
        ("/v1/nothing", {}),
    ]
    pairs: list[tuple[httpx.Response, httpx.Response]] = []
    too_large: list[httpx.Response] = []

    def ask_both() -> None:
        try:
            wait_until_up(on_ray, 120)
            for path, body in questions * 2:  # twice: both replicas
                pairs.append((httpx.post(url + path, json=body), httpx.post(on_ray + path, json=body)))
            headers = {"content-type": "application/json"}
            blocks = (b" " * 2**20 for _ in range(25))
            too_large.append(
                httpx.post(f"{on_ray}/v1/embeddings", content=blocks, headers=headers, timeout=60)
            )
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask_both)
    asking.start()
    serve(config)
    asking.join()
    assert len(pairs) == 2 * len(questions)
    for local, ray in pairs:
        assert ray.status_code == local.status_code
        assert ray.headers["content-type"] == local.headers["content-type"]
        assert len(ray.headers.get_list("x-request-id")) == 1
        assert_alike(ray.json(), local.json())
    assert too_large[0].status_code == 413
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{on_ray}/health").raise_for_status()


def assert_alike(one: Any, other: Any) -> None:
    """Equal, numbers to 1e-6."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b)
    else:
        assert one == (pytest.approx(other, abs=1e-6) if isinstance(one, float) else other)
