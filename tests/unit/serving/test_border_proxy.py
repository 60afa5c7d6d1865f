"""The border around Ray Serve's proxy: with stand-ins that speak as the proxy does, and (slow) around the real one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from fmray.runtime.ports import free_port
from fmray.serving.proxy_border import IMPORT_PATH, ProxyBorder, middlewares

Said = tuple[int, dict[str, str], bytes]


def through(app: Any, headers: dict[str, str], path: str = "/v1/x") -> tuple[Said | None, dict[str, str]]:
    """What a client gets, and the headers that Serve saw."""
    sent: list[Message] = []
    seen: dict[str, str] = {}

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
        await app(scope, receive, send)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
    asyncio.run(ProxyBorder(inner)(scope, receive, send))
    if not sent:
        return None, seen
    (start,) = (message for message in sent if message["type"] == "http.response.start")
    body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    told = {bytes(name).decode(): bytes(value).decode() for name, value in start["headers"]}
    return (start["status"], told, body), seen


def serve_says(
    status: int | None, text: str = "", kind: str = "text/plain; charset=utf-8", **extra: str
) -> Any:
    """Serve's own answers: lists for header pairs, the body in one message, the request id it adds itself."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        if status is None:
            return
        pairs = {
            "content-type": kind,
            "x-request-id": "serves-id",
            **{k.replace("_", "-"): v for k, v in extra.items()},
        }
        headers = [[name.encode(), value.encode()] for name, value in pairs.items()]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    return app


ANSWERS: dict[str, tuple[Any, int, str, str | None]] = {
    "a timeout": (serve_says(408, "Request 1 timed out after 5.0s."), 504, "deadline_exceeded", "1"),
    "a full queue": (serve_says(503, "Request dropped due to backpressure"), 503, "unavailable", "1"),
    "a full queue, configured": (serve_says(429, "dropped", retry_after="7"), 429, "overloaded", "7"),
    "no deployment": (serve_says(503, "Deployment is unavailable"), 503, "unavailable", "1"),
    "no application": (serve_says(404, "Path '/secret' not found. Ping"), 404, "not_found", None),
    "an actor that died": (serve_says(None), 503, "replica_lost", "1"),
    "a bare failure": (serve_says(500, "Internal Server Error"), 503, "replica_lost", "1"),
    "a client that left": (serve_says(499, "Client for request 1 disconnected"), 503, "replica_lost", "1"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_serves_own_words_are_replaced(name: str) -> None:
    app, status, code, after = ANSWERS[name]
    said, seen = through(app, {})
    assert said is not None
    got, headers, body = said
    error = json.loads(body)["error"]
    assert (got, error["code"], headers.get("retry-after")) == (status, code, after)
    assert list(error) == ["message", "type", "param", "code"]
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(body)
    assert headers["x-request-id"] in ("serves-id", seen["x-request-id"])
    assert (headers.get("x-should-retry") == "true") is (status >= 500)
    assert b"secret" not in body


def test_what_the_app_says_passes_untouched() -> None:
    for kind, status in (
        ("application/json", 400),
        ("text/event-stream", 200),
        ("text/plain", 200),
        ("image/png", 404),
    ):
        said, _ = through(serve_says(status, "as it is", kind, retry_after="9"), {})
        assert said is not None
        assert (said[0], said[1]["content-type"], said[2]) == (status, kind, b"as it is")
    health, _ = through(serve_says(503, "This node is being drained."), {}, "/-/healthz")
    assert health is not None
    assert health[2] == b"This node is being drained."


def test_no_header_of_a_stranger_steers_serve() -> None:
    sent = {
        "x-request-timeout-seconds": "0",
        "x-request-disconnect-disabled": "?1",
        "x-request-id": "a b<script>",
        "x-other": "stays",
    }
    _, seen = through(serve_says(200), sent)
    assert seen["x-request-id"].startswith("req_")
    assert seen["x-fmray-timeout-seconds"] == "0"
    assert seen["x-other"] == "stays"
    assert not {"x-request-timeout-seconds", "x-request-disconnect-disabled"} & seen.keys()
    assert through(serve_says(200), {"x-request-id": "mine"})[1]["x-request-id"] == "mine"


def test_serve_takes_what_it_is_given() -> None:
    pytest.importorskip("ray")
    from ray._common.utils import import_attr
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    assert import_attr(IMPORT_PATH) is middlewares
    assert validate_http_proxy_callback_return(middlewares())[0].cls is ProxyBorder


PROGRAM = """
import os, sys, time, httpx, json, signal
import ray
from ray import serve
from fastapi import FastAPI, Request
from fmray.serving.border import Border, install_error_answers
from fmray.serving.rate_limits import RateLimits
from fmray.runtime.ray_limits import RayLedger

port = int(sys.argv[1])
ray.init("local", num_cpus=4, log_to_driver=False, include_dashboard=False, _system_config={"worker_niceness": 0})
serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 3})

def build():
    import asyncio
    app = FastAPI()
    app.add_middleware(Border, max_body=2**20, deadline_seconds=30, limits=RateLimits(RayLedger("t"), requests=50))
    install_error_answers(app)

    @app.post("/sleep/{seconds}")
    async def sleep(seconds: float):
        await asyncio.sleep(seconds)
        return {"pid": os.getpid()}

    @app.post("/die")
    async def die():
        os._exit(1)

    @app.get("/health")
    async def health(request: Request):
        return dict(request.headers)

    return app

deployment = serve.deployment(serve.ingress(build)()).options(num_replicas=2, ray_actor_options={"num_cpus": 0.5})
serve.run(deployment.bind(), name="t", route_prefix="/")
url, told = f"http://127.0.0.1:{port}", {}

def post(path, **headers):
    reply = httpx.post(url + path, json={}, headers=headers, timeout=60)
    return [reply.status_code, dict(reply.headers), reply.json()]

told["deadline"] = post("/sleep/9", **{"x-request-timeout-seconds": "0.3"})
told["zero"] = post("/sleep/9", **{"x-request-timeout-seconds": "0"})
told["serves own"] = post("/sleep/9")
told["health"] = dict(httpx.get(url + "/health", headers={"x-request-id": "a b"}).headers)
told["died"] = post("/die")
time.sleep(8)
statuses, pids = [], set()
for _ in range(90):
    status, headers, body = post("/sleep/0")
    statuses.append(status)
    pids.add(body.get("pid"))
told["statuses"], told["pids"] = statuses, len(pids - {None})
actor = ray.get_actor("t-limits", namespace="fmray-limits")
ray.kill(actor)
time.sleep(1)  # a refusal is remembered for half a second
told["after"] = [post("/sleep/0")[0] for _ in range(3)]
print("TOLD" + json.dumps(told))
serve.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_around_the_real_proxy(tmp_path: Path) -> None:
    """Two replicas behind Serve: its headers, its errors, a replica that dies, a limit that both share."""
    pytest.importorskip("ray")
    environment = {**os.environ, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": IMPORT_PATH}
    root = str(Path(__file__).parents[3])
    environment["PYTHONPATH"] = root
    command = [sys.executable, "-c", PROGRAM, str(free_port())]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    line = next((line for line in done.stdout.splitlines() if line.startswith("TOLD")), None)
    assert line is not None, done.stderr[-3000:]
    told = json.loads(line[4:])
    for name in ("deadline", "zero", "serves own"):
        status, headers, body = told[name]
        assert (status, body["error"]["code"], headers["retry-after"]) == (504, "deadline_exceeded", "1"), (
            name
        )
    status, headers, body = told["died"]
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (503, "replica_lost", "true")
    assert told["health"]["x-request-id"].startswith("req_")
    assert told["pids"] == 2
    assert 40 <= told["statuses"].count(200) <= 50
    assert set(told["statuses"]) == {200, 429}
    assert told["after"] == [200, 200, 200]  # the new actor knows nothing yet: documented
