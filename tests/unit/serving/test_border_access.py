"""Keys, limits and logs at the border: who is let in, how often, and that nothing secret is written down."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from fmray.serving.bodies import DEEPEST, MOST_VALUES, JsonShape
from fmray.serving.finished import Finished, log_finished
from fmray.serving.keys import Access, KeyFile
from fmray.serving.rate_limits import RateLimits
from tests.unit.serving.border_app import SECRET, ask, border_app, connect, post, running, until

PRIVATE = "what only alice may know"


class Guarded:
    """An endpoint with two keys, and what it told of the requests that it answered."""

    def __init__(self, port: int, alice: str, bob: str, told: list[Finished]) -> None:
        self.port, self.url, self.alice, self.bob, self.told = (
            port,
            f"http://127.0.0.1:{port}",
            alice,
            bob,
            told,
        )

    def call(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.request(
            method, self.url + path, headers={**headers, **options.pop("headers", {})}, **options
        )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    file, told = KeyFile(tmp_path_factory.mktemp("keys") / "keys.yaml"), []
    alice, bob = file.add("alice"), file.add("bob", requests=3, inputs=10)

    def finished(request: Finished) -> None:
        told.append(request)
        log_finished(request)

    app, _ = border_app(access=Access(file.path), limits=RateLimits(), finished=finished, body_seconds=0.5)
    with running(app) as port:
        yield Guarded(port, alice, bob, told)


CLOSED = [
    ("GET", "/v1/models"),
    ("POST", "/v1/echo"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/redoc"),
    ("GET", "/docs/oauth2-redirect"),
    ("GET", "/v1/nothing"),
    ("POST", "/health"),
    ("DELETE", "/ready"),
    ("OPTIONS", "/v1/models"),
    ("GET", "//v1/models"),
    ("GET", "/page/../v1/models"),
    ("GET", "/health/../v1/models"),
    ("GET", "/pages"),
    ("GET", "/healthy"),
]
"""`/page/../…` and its like are no open path that leads elsewhere: no route has it, and no router here resolves dots."""


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_no_route_without_a_key(guarded: Guarded, method: str, path: str) -> None:
    request = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode()
    status, headers, body = ask(guarded.port, request)
    if path.startswith("/page/"):
        assert (status, body["error"]["code"]) == (404, "not_found")
        return
    assert (status, headers["www-authenticate"]) == (401, 'Bearer realm="fmray"')
    assert body["error"]["type"] == "authentication_error"
    assert body["error"]["code"] == "missing_api_key"
    assert headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/page/app.js", "/health?x=1"])
def test_open_routes(guarded: Guarded, path: str) -> None:
    assert guarded.call("GET", path).status_code == 200
    assert guarded.call("GET", path, "wrong").status_code == 200


def test_a_body_is_not_read_before_the_key(guarded: Guarded) -> None:
    status, _, body = ask(guarded.port, post("/v1/echo", b"", "content-length: 900000"))
    assert (status, body["error"]["code"]) == (401, "missing_api_key")


def test_openais_client(guarded: Guarded) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.alice)
    told = client.post("/echo", cast_to=dict[str, str], body={"text": "hi"})
    assert told == {"text": "hi", "key": "alice"}
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="fmray-x").models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id


def test_a_key_has_its_own_limits(guarded: Guarded) -> None:
    body = {"inputs": ["a"] * 4}
    replies = [guarded.call("POST", "/v1/echo", guarded.bob, json=body) for _ in range(4)]
    assert [reply.status_code for reply in replies] == [200, 200, 429, 429]
    first, _, inputs, requests = replies
    assert first.headers["x-ratelimit-limit-requests"] == "3"
    assert first.headers["x-ratelimit-remaining-requests"] == "2"
    assert first.headers["x-ratelimit-limit-inputs"] == "10"
    assert first.headers["x-ratelimit-remaining-inputs"] == "6"
    assert first.headers["x-ratelimit-reset-requests"].startswith("1m0")
    assert inputs.json()["error"]["message"].startswith("this key may send 10 inputs a minute; ask again in ")
    assert requests.json()["error"]["message"].startswith(
        "this key may send 3 requests a minute; ask again in "
    )
    for refused in (inputs, requests):
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 55 <= int(refused.headers["retry-after"]) <= 61
        assert 55_000 <= int(refused.headers["retry-after-ms"]) <= 61_000
    for _ in range(20):
        assert guarded.call("POST", "/v1/echo", guarded.alice, json=body).status_code == 200
    assert guarded.call("GET", "/health", guarded.bob).status_code == 200


def test_without_keys_an_address_has_the_limit() -> None:
    app, _ = border_app(limits=RateLimits(requests=2), address_header="x-forwarded-for")
    with running(app) as port:
        url = f"http://127.0.0.1:{port}/v1/models"

        def status(**headers: str) -> int:
            return httpx.get(
                url, headers={name.replace("_", "-"): text for name, text in headers.items()}
            ).status_code

        assert [status(x_forwarded_for="1.1.1.1, 10.0.0.1") for _ in range(3)] == [200, 200, 429]
        assert (
            status(x_forwarded_for="9.9.9.9, 10.0.0.1") == 429
        )  # what a client writes before it is no way round
        assert status(x_forwarded_for="10.0.0.2") == 200
        assert [status() for _ in range(3)] == [200, 200, 429]
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_a_refused_client_comes_back_by_itself() -> None:
    """The unmodified openai client obeys `retry-after-ms`; the window is made short for that."""
    app, _ = border_app(limits=RateLimits(ShortLedger(), requests=2))
    with running(app) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=3)
        start = time.monotonic()
        for _ in range(5):
            client.post("/echo", cast_to=dict[str, str], body={})
        assert 0.7 < time.monotonic() - start < 5


class ShortLedger:
    """A minute of 0.6 seconds: the same windows on a clock that runs a hundred times faster."""

    def __init__(self) -> None:
        from fmray.runtime.windows import Windows

        self.windows = Windows()

    async def take(self, name: str, limit: int, need: int) -> Any:
        from dataclasses import replace

        grant = self.windows.take(name, limit, need, need, time.monotonic() * 100)
        return replace(grant, wait=grant.wait / 100, reset=grant.reset / 100)


# -------------------------------------------------------------------------------------------------------- logs


def test_a_finished_request_is_one_line(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fmray.requests"):
        reply = guarded.call("POST", "/v1/echo?text=query", guarded.alice, json={"text": PRIVATE})
        assert until(lambda: any(reply.headers["x-request-id"] in line for line in caplog.messages))
    (line,) = (line for line in caplog.messages if reply.headers["x-request-id"] in line)
    words = line.split()
    assert words[:3] == ["POST", "/v1/echo", "200"]
    assert float(words[3]) >= 0
    assert words[4:] == ["ms", reply.headers["x-request-id"], "key=alice"]


def test_no_path_is_written_down(guarded: Guarded) -> None:
    guarded.told.clear()
    guarded.call("GET", f"/v1/{PRIVATE}", guarded.alice)
    guarded.call("POST", "/v1/fail/value", guarded.alice, json={})
    assert until(lambda: len(guarded.told) == 2)
    assert [(row.route, row.status, row.key_name) for row in guarded.told] == [
        ("-", 404, "alice"),
        ("/v1/fail/{kind}", 500, "alice"),
    ]


def test_who_left_is_499(guarded: Guarded) -> None:
    guarded.told.clear()
    with connect(guarded.port) as raw:
        raw.sendall(post("/v1/slow", b'{"number": 30}', f"authorization: Bearer {guarded.alice}"))
        time.sleep(0.2)
    assert until(lambda: [row.status for row in guarded.told] == [499])


def test_nothing_secret_is_ever_logged(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    """Every way a request can end, with all loggers at DEBUG: no key, no prompt, no path, no text of an exception."""
    key, text = guarded.alice, json.dumps({"text": PRIVATE, "number": 3}).encode()
    authorization = f"authorization: Bearer {key}"
    wrong = "fmray-ThisIsAWrongKeyThatMightBeARightOneElsewhere"
    for name in ("httpx", "httpcore"):
        caplog.set_level(logging.CRITICAL, name)  # a client's own, from other tests in this process
    for name in (
        "uvicorn.access",
        "uvicorn.error",
        "uvicorn",
        "fastapi",
        "starlette",
        "asyncio",
        "fmray",
        "",
    ):
        caplog.set_level(logging.DEBUG, name)
    requests = [
        post("/v1/echo", text, authorization),
        post("/v1/echo", text, f"authorization: Bearer {wrong}"),
        post("/v1/echo", text, f"authorization: Basic {key}"),
        post("/v1/echo", text, authorization, f"x-request-id: {PRIVATE}"),
        post("/v1/echo", text[:-2], authorization),
        post("/v1/echo", b"[" * 1000 + text, authorization),
        post("/v1/echo", text.replace(b"3", b'"' + PRIVATE.encode() + b'"'), authorization),
        post("/v1/echo", text, authorization, f"content-length: {10**9}"),
        post("/v1/echo", text, authorization, f"content-length: {len(text) + 9}"),
        post(f"/v1/{PRIVATE.replace(' ', '%20')}", text, authorization),
        post("/v1/fail/request", text, authorization),
        post("/v1/fail/value", text, authorization),
        post("/v1/fail/key", text, authorization),
        post("/v1/fail/runtime", text, authorization),
        post("/v1/slow", text, authorization, "x-request-timeout-seconds: 0.1"),
        post("/v1/echo", text, authorization, "x-big: " + PRIVATE * 3000),
        post(f"/v1/echo?{PRIVATE}", text, authorization),  # a space in the request line
    ]
    statuses = [ask(guarded.port, request)[0] for request in requests]
    assert statuses == [200, 401, 401, 200, 400, 400, 400, 413, 408, 404, 400, 500, 500, 500, 504, 431, 400]
    with connect(guarded.port) as raw:  # a stream that breaks
        raw.sendall(post("/v1/stream", b'{"number": 3, "text": "break"}', authorization))
        while raw.recv(65536):
            pass
    gc.collect()  # a task whose exception nobody has taken would be logged now
    time.sleep(0.2)
    formatter = logging.Formatter("%(name)s %(message)s")
    lines = "\n".join(formatter.format(record) for record in caplog.records)
    assert lines.count("failed with ValueError") == 1
    assert "border_app.py" in lines  # where it failed is told
    for secret in (key, key[6:], wrong, wrong[6:], SECRET, PRIVATE, PRIVATE.replace(" ", "%20")):
        assert secret not in lines


# ------------------------------------------------------------------------------------------- the shape of a body


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max((depth_of(item) for item in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((depth_of(item) for item in value), default=0)
    return 0


def test_the_scan_sees_what_the_parser_sees() -> None:
    """Random JSON full of brackets, quotes and backslashes in its texts, cut anywhere into chunks."""
    import random

    chance = random.Random(0)

    def value(depth: int) -> object:
        if depth == 0 or chance.random() < 0.3:
            return "".join(chance.choice('[]{}",\\ab\n/é🧡') for _ in range(chance.randrange(8)))
        items = [value(depth - 1) for _ in range(chance.randrange(4))]
        if chance.random() < 0.5:
            return items
        return {
            "".join(chance.choice('[{"\\k') for _ in range(3)) + str(i): item for i, item in enumerate(items)
        }

    for _ in range(500):
        original = value(chance.randrange(8))
        text = json.dumps(original, ensure_ascii=chance.random() < 0.5).encode()
        shape, deepest, at = JsonShape(), 0, 0
        while at < len(text):
            step = chance.randrange(1, 5)
            shape.feed(text[at : at + step])
            deepest, at = max(deepest, shape.depth), at + step
        assert shape.depth == 0
        assert deepest <= depth_of(original)
        one_by_one = JsonShape()
        highest = 0
        for byte in text:
            one_by_one.feed(bytes([byte]))
            highest = max(highest, one_by_one.depth)
        assert highest == depth_of(original)
        assert one_by_one.values == shape.values


@pytest.mark.parametrize(
    "attack",
    [
        b"[" * 20 * 2**20,
        b'[{"a":' * (3 * 2**20),
        b"[]," * (7 * 2**20),
        b'"",' * (7 * 2**20),
        b"1," * (10 * 2**20),
        b'"' + b"\\" * (20 * 2**20),
        b'"' + b"[" * (20 * 2**20) + b'"',
    ],
    ids=["lists", "objects", "empty lists", "empty texts", "numbers", "backslashes", "one text"],
)
def test_no_body_keeps_the_loop(attack: bytes) -> None:
    """20 MiB in 64 KiB chunks, as servers hand them over: what one chunk costs is what other requests wait."""
    from fmray.errors import RequestError

    shape, longest = JsonShape(), 0.0
    for start in range(0, len(attack), 2**16):
        begun = time.thread_time()
        try:
            shape.feed(attack[start : start + 2**16])
        except RequestError:
            break
        finally:
            longest = max(longest, time.thread_time() - begun)
    assert longest < 0.02
    assert shape.depth <= DEEPEST
    assert shape.values <= MOST_VALUES + 2**16
