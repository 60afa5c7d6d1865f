"""What strangers do beside pictures and headers: odd texts, extremes, leaving at any moment, reading slowly, coming in crowds."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from PIL import Image
from starlette.responses import StreamingResponse

from fmray.config.serving import BatchConfig, ServeConfig
from fmray.models.answering import load_answering
from fmray.serving import connections
from fmray.serving.app import build_app
from fmray.serving.border import Border
from fmray.serving.chat_engine import AnswerEngine
from fmray.serving.chat_loop import ChatLoop
from fmray.serving.metrics import Meters
from fmray.serving.opening import Endpoint
from fmray.serving.shelf import AnsweringModel, Shelf
from tests.e2e.turnstile import Turnstile
from tests.endpoint import app_of, data_url, picture, serving
from tests.unit.serving.border_app import post, running, until

HEADERS = {"content-type": "application/json"}
RED = data_url(picture("red"))


# ----------------------------------------------------------------------------------------------- texts and numbers


@pytest.fixture(scope="module")
def whole(checkpoint: str, vqa_checkpoint: str, mllm_checkpoint: str) -> Iterator[httpx.Client]:
    more = {"vqa": vqa_checkpoint, "mllm": mllm_checkpoint}
    endpoint = Endpoint(ServeConfig(checkpoint=checkpoint, model_id="clip", more=more))
    with serving(endpoint.app) as url, httpx.Client(base_url=url, timeout=60, headers=HEADERS) as client:
        yield client


def chat(model: str, text: str, **options: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": RED}}]
    return {"model": model, "messages": [{"role": "user", "content": parts}], **options}


def sent(client: httpx.Client, path: str, body: object) -> httpx.Response:
    return client.post(path, content=json.dumps(body))


def refused(reply: httpx.Response, code: str, param: str | None) -> None:
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert len(error["message"]) < 300
    assert "\n" not in error["message"]


ODD = {
    "null byte": "what\0is it?",
    "control tokens": "<|endoftext|><|im_start|>system",
    "marks of pictures": "<image><img></s>[INST]",
    "right to left": "\u202eما هذا؟",
    "emoji": "🧡" * 5,
    "braces": "{0.__class__} {{}} %s %(x)s",
    "surrogates that are a pair": "\ud83e\udde1",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_texts_are_only_texts_to_every_model(whole: httpx.Client, name: str) -> None:
    text = json.loads(json.dumps(ODD[name]))  # a pair of surrogates is one letter to JSON
    assert sent(whole, "/v1/embeddings", {"model": "clip", "input": text}).status_code == 200
    assert sent(whole, "/v1/chat/completions", chat("mllm", text, max_tokens=2)).status_code == 200
    reply = sent(whole, "/v1/chat/completions", chat("vqa", text, max_tokens=2))
    if reply.status_code != 200:  # its question has twelve tokens at most, here about one per letter
        refused(reply, "context_length_exceeded", "messages")
    body = {"model": "clip", "input": RED, "labels": [text], "template": text + " {}"}
    assert sent(whole, "/v1/classify", body).json()["data"][0]["probs"] == [{"label": text, "score": 1.0}]


@pytest.mark.parametrize("model", ["mllm", "vqa"])
def test_a_megabyte_of_text_is_refused_at_once(whole: httpx.Client, model: str) -> None:
    began = time.monotonic()
    reply = sent(whole, "/v1/chat/completions", chat(model, "a " * 2**19))
    refused(reply, "context_length_exceeded", "messages")
    assert time.monotonic() - began < 5
    refused(
        sent(whole, "/v1/embeddings", {"model": "clip", "input": "a " * 2**19}),
        "context_length_exceeded",
        "input[0]",
    )


EXTREMES: dict[str, tuple[dict[str, Any], str, str]] = {
    "n of 2": ({"n": 2}, "unsupported_parameter", "n"),
    "n of 0": ({"n": 0}, "unsupported_parameter", "n"),
    "n below nothing": ({"n": -1}, "unsupported_parameter", "n"),
    "a milliard of n": ({"n": 10**9}, "unsupported_parameter", "n"),
    "n of 4000 digits": ({"n": 10**4000}, "unsupported_parameter", "n"),
    "n is true": ({"n": True}, "unsupported_parameter", "n"),
    "tokens below nothing": ({"max_tokens": -5}, "invalid_value", "max_tokens"),
    "tokens of 4000 digits": ({"max_tokens": 10**4000}, "invalid_value", "max_tokens"),
    "more tokens than there is room for": ({"max_tokens": 2**31}, "context_length_exceeded", "max_tokens"),
    "temperature below nothing": ({"temperature": -0.1}, "invalid_value", "temperature"),
    "temperature beyond floats": ({"temperature": 10**400}, "invalid_value", "temperature"),
    "temperature is no number": ({"temperature": float("nan")}, "invalid_value", "temperature"),
    "temperature is endless": ({"temperature": float("inf")}, "invalid_value", "temperature"),
    "top_p beyond one": ({"top_p": 1.01}, "invalid_value", "top_p"),
    "a stream with tools": (
        {"stream": True, "tools": [{"type": "function", "function": {"name": "f"}}]},
        "unsupported_parameter",
        "tools",
    ),
    "a stream with a tool choice": ({"stream": True, "tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
    "a stop of a megabyte": ({"stop": "a" * 2**20}, "invalid_value", "stop"),
}  # fmt: skip


@pytest.mark.parametrize("model", ["mllm", "vqa"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_refused_in_a_line(whole: httpx.Client, name: str, model: str) -> None:
    options, code, param = EXTREMES[name]
    reply = sent(whole, "/v1/chat/completions", chat(model, "a", **options))
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], str(error["param"]).partition("[")[0]) == (400, code, param), (
        error
    )
    assert len(error["message"]) < 300


TAKEN: dict[str, dict[str, Any]] = {
    "temperature so small that it is none": {"temperature": 5e-324},
    "the hottest": {"temperature": 2.0},
    "the smallest seed": {"seed": -(2**63), "temperature": 1.0},
    "the largest seed": {"seed": 2**63 - 1, "temperature": 1.0},
    "whole numbers with a point": {"max_tokens": 2.0, "seed": 7.0},
    "next to nothing drawn from": {"top_p": 5e-324, "temperature": 1.0},
    "a stream that may call no tools": {"stream": True, "tools": [], "tool_choice": "none"},
}


@pytest.mark.parametrize("model", ["mllm", "vqa"])
@pytest.mark.parametrize("name", TAKEN)
def test_extremes_that_are_answered(whole: httpx.Client, name: str, model: str) -> None:
    reply = sent(whole, "/v1/chat/completions", chat(model, "a", **{"max_tokens": 3, **TAKEN[name]}))
    assert reply.status_code == 200, reply.text


def test_counts_beyond_everything_are_all(whole: httpx.Client) -> None:
    ranked = {"model": "clip", "query": "a", "documents": ["b", "c"], "top_n": 10**30}
    assert len(sent(whole, "/v1/rerank", ranked).json()["results"]) == 2
    labels = [f"label {number}" for number in range(1000)]
    for several in (labels[:1], labels):
        body = {"model": "clip", "input": RED, "labels": several, "top_k": 10**30, "template": "{}"}
        assert len(sent(whole, "/v1/classify", body).json()["data"][0]["probs"]) == len(several)


# ------------------------------------------------------------------------------------------------------ who leaves


class Talk:
    """A tiny multimodal LLM whose every token takes its time, behind a real socket."""

    def __init__(self, checkpoint: str) -> None:
        engine = AnswerEngine(load_answering(checkpoint, torch.device("cpu")), "mllm", max_pixels=10**6)
        meters, config = Meters(), ServeConfig(checkpoint="none")
        self.loop = ChatLoop("m", engine, BatchConfig(), meters)
        self.app = build_app(Shelf([AnsweringModel("m", "none", engine, self.loop)], meters), config, meters)
        self.steps = 0
        step = self.loop._running.step

        def slowly() -> Any:
            time.sleep(0.02)
            self.steps += 1
            return step()

        self.loop._running.step = slowly  # type: ignore[method-assign]

    @property
    def idle(self) -> bool:
        """Nobody is answered and nothing is held."""
        return not self.loop._running.rows and self.loop.admission.empty


@pytest.fixture(scope="module")
def talk(mllm_checkpoint: str) -> Talk:
    return Talk(mllm_checkpoint)


@pytest.fixture(scope="module")
def talk_port(talk: Talk) -> Iterator[int]:
    with serving(talk.app) as url:
        yield int(url.rpartition(":")[2])


LONG = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "what is it?"}], "max_tokens": 150,
     "temperature": 1.5, "seed": 1, "stream": True}
).encode()  # fmt: skip


def test_who_leaves_a_stream_ends_the_answer(talk: Talk, talk_port: int) -> None:
    with socket.create_connection(("127.0.0.1", talk_port), timeout=10) as raw:
        raw.sendall(post("/v1/chat/completions", LONG))
        while b"data: " not in raw.recv(65536):
            pass
    said = talk.steps
    assert until(lambda: talk.idle)
    assert talk.steps - said < 50, "of 150 tokens"


def test_who_leaves_before_his_turn_is_not_begun(talk: Talk, talk_port: int) -> None:
    begun = talk.steps
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", talk_port), timeout=10) as raw:
            raw.sendall(post("/v1/chat/completions", LONG))
    assert until(lambda: talk.idle)
    assert talk.steps - begun < 100, "of 3000 tokens"


def test_a_slow_reader_gets_everything_and_keeps_nobody(talk: Talk, talk_port: int) -> None:
    with socket.create_connection(("127.0.0.1", talk_port), timeout=10) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.sendall(post("/v1/chat/completions", LONG, "connection: close"))
        time.sleep(0.2)
        began = time.monotonic()
        quick = httpx.post(
            f"http://127.0.0.1:{talk_port}/v1/chat/completions",
            json={"model": "m", "messages": [{"role": "user", "content": "no"}], "max_tokens": 3},
            timeout=30,
        )
        assert quick.status_code == 200
        assert time.monotonic() - began < 2
        read = b""
        while part := raw.recv(1024):
            read += part
            time.sleep(0.001)
    assert b"data: [DONE]" in read
    assert until(lambda: talk.idle)


@pytest.mark.parametrize("protocol", ["httptools", "h11"])
def test_who_asks_and_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    """uvicorn alone would keep the connection, and what makes the answer, for ever."""
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.5)
    ended, app = threading.Event(), FastAPI()
    app.add_middleware(Border, max_body=2**20)

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"a" * 2**16
                await asyncio.sleep(0)
        finally:
            ended.set()

    @app.post("/endless")
    async def route() -> StreamingResponse:
        return StreamingResponse(endless())

    made = getattr(connections, f"_bounded_{protocol}")()
    with running(app, made) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(post("/endless", b"{}"))
        for _ in range(20):  # who reads, if slowly, is waited for
            assert raw.recv(2**18)
            time.sleep(0.05)
        assert not ended.is_set()
        assert ended.wait(5)


@pytest.fixture
def held() -> Turnstile:
    return Turnstile()


def embed(*texts: str) -> bytes:
    return post("/v1/embeddings", json.dumps({"model": "m", "input": list(texts)}).encode())


def test_who_leaves_spares_the_model(held: Turnstile) -> None:
    """Before his body is there, while he waits, and while his own item is being computed."""
    with serving(app_of(held)) as url:
        port = int(url.rpartition(":")[2])
        held.opened.clear()
        at_work = socket.create_connection(("127.0.0.1", port), timeout=10)
        at_work.sendall(embed("at work"))
        assert held.working.wait(5)
        for text in ("waits", "waits too"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
                raw.sendall(embed(text, text + " twice"))
                time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(embed("half of it")[:-5])
        at_work.close()
        time.sleep(0.2)
        held.opened.set()
        assert httpx.post(f"{url}/v1/embeddings", json={"model": "m", "input": "next"}).status_code == 200
        assert held.seen == ["at work", "next"]
        assert 'fmray_held_items{model="m"} 0.0' in httpx.get(f"{url}/metrics").text


# ----------------------------------------------------------------------------------------------------------- crowds


def test_a_crowd_is_answered_or_told_to_come_back(held: Turnstile) -> None:
    app = app_of(held, batch=BatchConfig(queue_items=8))

    async def scene(url: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
            ask = [client.post("/v1/embeddings", json={"model": "m", "input": f"{i}"}) for i in range(150)]
            return list(await asyncio.gather(*ask))

    with serving(app) as url:
        held.opened.clear()
        threading.Timer(1.0, held.opened.set).start()
        replies = asyncio.run(scene(url))
        statuses = [reply.status_code for reply in replies]
        assert set(statuses) == {200, 429}
        assert 8 <= statuses.count(200) < 150
        for reply in replies:
            if reply.status_code == 429:
                assert int(reply.headers["retry-after"]) >= 1
                assert int(reply.headers["retry-after-ms"]) >= 1
                assert reply.json()["error"]["code"] == "overloaded"
        assert httpx.post(f"{url}/v1/embeddings", json={"model": "m", "input": "after"}).status_code == 200
        assert 'fmray_held_items{model="m"} 0.0' in httpx.get(f"{url}/metrics").text


def test_small_pictures_pass_huge_ones(checkpoint: str) -> None:
    """One client sends many large pictures; another one's small ones are not behind all of them."""
    out = io.BytesIO()
    Image.new("RGB", (3000, 3000), "navy").save(out, "PNG")
    huge = {"model": "m", "input": [data_url(out.getvalue())] * 40}
    endpoint = Endpoint(ServeConfig(checkpoint=checkpoint, model_id="m"))
    waits: list[float] = []
    with serving(endpoint.app) as url, httpx.Client(base_url=url, timeout=120) as client:
        began = time.monotonic()
        ended: list[float] = []

        def send_huge() -> None:
            assert httpx.post(f"{url}/v1/embeddings", json=huge, timeout=120).status_code == 200
            ended.append(time.monotonic() - began)

        thread = threading.Thread(target=send_huge)
        thread.start()
        time.sleep(0.3)
        while thread.is_alive():
            asked = time.monotonic()
            assert client.post("/v1/embeddings", json={"model": "m", "input": RED}).status_code == 200
            waits.append(time.monotonic() - asked)
        thread.join()
    assert len(waits) >= 5, (waits, ended)
    assert sorted(waits)[len(waits) // 2] < ended[0] / 4, (waits, ended)
