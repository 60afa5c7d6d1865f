"""The border and the runner around engines that misbehave in ways a real model seldom does."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from fmray.serving.asks import Ask, TextAsk
from fmray.serving.clip_engine import Embedding, EmbeddingCapabilities
from fmray.serving.engines import Prepared
from tests.endpoint import app_of, serving


class LengthEngine:
    """A text becomes the unit vector at the angle of its length; `slow` takes its time, `break` fails."""

    max_batch = 2
    capabilities = EmbeddingCapabilities(
        kind="clip",
        modalities=("text",),
        output="embedding",
        max_tokens=77,
        image_size=1,
        dim=2,
        logit_scale=1.0,
        logit_bias=None,
    )

    def __init__(self) -> None:
        self.at_once, self.most_at_once, self.threads = 0, 0, set[str]()

    @property
    def probe(self) -> Ask:
        return TextAsk("probe", "probe")

    def prepare(self, ask: Ask) -> Prepared[str]:
        assert threading.current_thread() is not threading.main_thread()
        return Prepared(getattr(ask, "text", ""), "text", 1)

    def collate(self, items: Sequence[str]) -> list[str]:
        return list(items)

    def forward(self, inputs: list[str]) -> list[Embedding]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.threads.add(threading.current_thread().name)
        time.sleep(0.3 if "slow" in inputs else 0.005)
        self.at_once -= 1
        if "break" in inputs:
            raise RuntimeError(f"CUDA error: device-side assert at {hex(id(self))} in /secret/path.py")
        angle_N = torch.tensor([float(len(text)) for text in inputs])
        vectors_N2 = torch.stack([angle_N.cos(), angle_N.sin()], dim=1)
        return [Embedding(vector_D, tokens=1, truncated=False) for vector_D in vectors_N2]


@pytest.fixture(scope="module")
def engine() -> LengthEngine:
    return LengthEngine()


@pytest.fixture(scope="module")
def url(engine: LengthEngine) -> object:
    with serving(app_of(engine)) as url:
        yield url


def embed(url: str, *texts: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json={"model": "m", "input": list(texts)}, timeout=30)


def test_an_unexpected_failure_tells_nothing_and_is_not_retried(url: str) -> None:
    reply = embed(url, "break")
    assert reply.status_code == 500
    assert reply.json()["error"] == {
        "message": "the model could not answer this item",
        "type": "server_error",
        "param": None,
        "code": "model_failed",
    }
    assert reply.headers["x-should-retry"] == "false"
    assert reply.headers["x-request-id"].startswith("req_")
    with pytest.raises(openai.InternalServerError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="-").embeddings.create(model="m", input="break")
    assert embed(url, "fine").status_code == 200


def test_the_loop_answers_while_the_model_works(url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(embed, url, "slow")
        time.sleep(0.1)
        assert httpx.get(f"{url}/health").status_code == 200
        assert not slow.done()
        assert slow.result().status_code == 200


def test_the_model_has_one_thread_and_one_call_at_a_time(url: str, engine: LengthEngine) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: embed(url, *["x" * (i + 1)] * 3), range(16)))
    for i, reply in enumerate(replies):
        angle = torch.tensor(float(i + 1))
        for item in reply.json()["data"]:
            assert item["embedding"] == pytest.approx([angle.cos().item(), angle.sin().item()], abs=1e-6)
    assert engine.most_at_once == 1
    assert len(engine.threads) == 1
    assert "MainThread" not in engine.threads


def test_one_bad_item_does_not_spoil_another_request(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda text: embed(url, text), ["a", "break", "b", "break"]))
    assert [reply.status_code for reply in replies] == [200, 500, 200, 500]
