"""The unmodified openai client against every route and every status, over a real uvicorn; LangChain and LlamaIndex beside it."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from fmray.benchmarks.peers import PeerEnvironment
from fmray.config.serving import AccessConfig, BatchConfig, ServeConfig
from fmray.serving.asks import TextAsk
from fmray.serving.keys import KeyFile
from fmray.serving.opening import Endpoint
from tests.e2e.turnstile import Turnstile
from tests.endpoint import app_of, data_url, picture, serving
from tests.whole_endpoint import whole_config

RED, BLUE = data_url(picture("red")), data_url(picture("blue", kind="JPEG"), "image/jpeg")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    return whole_config(tmp_path_factory.mktemp("whole"), max_body_mib=1)


@pytest.fixture(scope="module")
def url(config: ServeConfig) -> Iterator[str]:
    with serving(Endpoint(config).app) as url:
        yield url


def client_of(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", **{"api_key": "-", "max_retries": 0, **options})


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


# ------------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_of_every_shape(client: openai.OpenAI) -> None:
    def create(value: Any, **options: Any) -> list[list[float]]:
        reply = client.embeddings.create(model="fmray-clip", input=value, **options)
        assert [item.index for item in reply.data] == list(range(len(reply.data)))
        return [item.embedding for item in reply.data]

    (alone,) = create("a red heart")  # base64 on the wire
    assert len(alone) == 8
    assert create(["a red heart"], encoding_format="float")[0] == pytest.approx(alone, abs=1e-7)
    raw = client.embeddings.create(model="fmray-clip", input="a red heart", encoding_format="base64").data[0]
    assert list(struct.unpack("<8f", base64.b64decode(str(raw.embedding)))) == pytest.approx(alone)
    (short,) = create("a red heart", dimensions=3)
    norm = sum(x * x for x in alone[:3]) ** 0.5
    assert short == pytest.approx([x / norm for x in alone[:3]], abs=1e-6)
    red, blue = create([RED, BLUE])
    assert create(RED, extra_body={"modality": "image"})[0] == pytest.approx(red, abs=1e-6)
    assert create([{"type": "image_url", "image_url": {"url": BLUE}}])[0] == pytest.approx(blue, abs=1e-6)
    assert red != pytest.approx(blue, abs=1e-3)


def test_own_routes_through_post(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "fmray-clip", "query": RED, "documents": ["red", BLUE, RED], "top_n": 2}
    ranked: Any = client.post("/rerank", cast_to=object, body=body)
    assert ranked["results"][0]["index"] == 2
    assert ranked["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-5)
    body = {"model": "fmray-clip", "text_1": RED, "text_2": [RED, BLUE]}
    scored: Any = client.post("/score", cast_to=object, body=body)
    assert scored["data"][0]["score"] == pytest.approx(1, abs=1e-5)
    body = {"model": "fmray-clip", "input": [RED, BLUE], "labels": ["red", "blue"], "top_k": 1}
    classified: Any = client.post("/classify", cast_to=object, body=body)
    assert [len(item["probs"]) for item in classified["data"]] == [1, 1]
    found: Any = client.post("/search", cast_to=object, body={"query": RED, "top_k": 3})
    assert len(found["data"]) == 3
    assert [model.id for model in client.models.list()] == ["fmray-clip", "fmray-vqa", "fmray-mllm"]
    assert client.models.retrieve("fmray-mllm").owned_by == "fmray"


# ------------------------------------------------------------------------------------------------------------- chat


def asked(text: str, *urls: str) -> Any:
    pictures = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def test_pictures_are_looked_at(client: openai.OpenAI) -> None:
    def say(model: str, *urls: str) -> Any:
        return client.chat.completions.create(
            model=model, messages=asked("what color is it?", *urls), logprobs=True
        )

    one = say("fmray-vqa", RED)
    assert one.choices[0].message.role == "assistant"
    assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens
    both, other = say("fmray-mllm", RED, BLUE), say("fmray-mllm", BLUE, RED)
    assert both.usage.prompt_tokens > say("fmray-mllm", RED).usage.prompt_tokens

    def first(reply: Any) -> float:
        return float(reply.choices[0].logprobs.content[0].logprob)

    assert first(both) != first(other), "which picture is first makes a difference"
    assert first(both) == pytest.approx(first(say("fmray-mllm", RED, BLUE)), abs=1e-5)


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    options: Any = {"model": "fmray-mllm", "messages": asked("what is it?", RED), "max_tokens": 12}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    with client.chat.completions.create(
        **options, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
    ) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["x-request-id"]
        chunks = list(stream)
    last = chunks.pop()
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    tokens = [token.token for each in told for token in each.content or []]
    assert tokens == [token.token for token in whole.choices[0].logprobs.content or []]


def test_stop_and_seed(client: openai.OpenAI) -> None:
    def say(**options: Any) -> str:
        reply = client.chat.completions.create(
            model="fmray-mllm", messages=asked("what is it?", RED), max_tokens=12, **options
        )
        return str(reply.choices[0].message.content)

    whole = say()
    assert len(whole) > 3, "the tiny model says something"
    assert say(stop=[whole[2]]) == whole[: whole.index(whole[2])]
    drawn = [say(temperature=2.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


# ----------------------------------------------------------------------------------------------------------- errors


class Held:
    """An endpoint whose model a test holds, and a client that notes what every one of its attempts was answered."""

    def __init__(self, **config: Any) -> None:
        self.engine = Turnstile()
        self.app = app_of(self.engine, **config)
        self.attempts: list[tuple[float, int]] = []

    def client(self, url: str, **options: Any) -> openai.OpenAI:
        def note(response: Any) -> None:
            self.attempts.append((time.monotonic(), response.status_code))

        return client_of(
            url, http_client=openai.DefaultHttpxClient(event_hooks={"response": [note]}), **options
        )

    def embed(self, client: openai.OpenAI, text: str = "a", **options: Any) -> Any:
        return client.embeddings.create(model="m", input=text, **options)

    def occupy(self, url: str) -> threading.Thread:
        """A request that holds the model until `engine.opened`."""
        self.engine.opened.clear()
        self.engine.working.clear()
        thread = threading.Thread(target=self.embed, args=(client_of(url), "first"))
        thread.start()
        assert self.engine.working.wait(10)
        return thread


def raised(expected: type[openai.APIStatusError], ask: Callable[[], object]) -> dict[str, Any]:
    """What the client raises: its class, and the facts that it reads from the reply."""
    with pytest.raises(expected) as caught:
        ask()
    error = caught.value
    assert error.request_id, "x-request-id"
    assert error.message
    return {"status": error.status_code, "code": error.code, "param": error.param, "type": error.type}


def facts(status: int, code: str, param: str | None, kind: str) -> dict[str, Any]:
    return {"status": status, "code": code, "param": param, "type": kind}


WRONG = "invalid_request_error"


def test_what_is_wrong_with_a_request_is_a_class_of_the_client(client: openai.OpenAI) -> None:
    def embed(**options: Any) -> Callable[[], object]:
        return lambda: client.embeddings.create(**{"model": "fmray-clip", "input": "a", **options})

    bad_picture = embed(input=["a", "data:image/png;base64,AAAA"])
    assert raised(openai.BadRequestError, bad_picture) == facts(
        400, "unsupported_image_format", "input[1]", WRONG
    )
    ids = embed(input=[[1, 2, 3]])
    assert raised(openai.BadRequestError, ids) == facts(400, "invalid_value", "input[0]", WRONG)
    unknown = embed(model="gpt-4")
    assert raised(openai.NotFoundError, unknown) == facts(404, "model_not_found", "model", "not_found_error")
    other_kind = embed(model="fmray-vqa")
    assert raised(openai.NotFoundError, other_kind)["code"] == "route_not_served"
    nowhere = raised(openai.NotFoundError, lambda: client.post("/completions", cast_to=object, body={}))
    assert nowhere == facts(404, "not_found", None, "not_found_error")
    large = raised(openai.APIStatusError, embed(input="x" * 2**20))
    assert large == facts(413, "request_too_large", None, WRONG)
    form = raised(openai.APIStatusError, embed(extra_headers={"content-type": "text/plain"}))
    assert form == facts(415, "unsupported_media_type", None, WRONG)

    def twice() -> object:
        return client.chat.completions.create(model="fmray-vqa", messages=asked("?", RED), n=2)

    assert raised(openai.BadRequestError, twice) == facts(400, "unsupported_parameter", "n", WRONG)


def test_keys_and_their_limits(config: ServeConfig, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.yaml")
    alice = keys.add("alice", requests=2)
    access = AccessConfig(key_file=str(keys.path))
    guarded = config.replace(more={}, indexes={}, access=access)
    with serving(Endpoint(guarded).app) as url:
        for wrong in ("fmray-wrong", "-"):
            refused = raised(openai.AuthenticationError, client_of(url, api_key=wrong).models.list)
            assert refused == facts(401, "invalid_api_key", None, "authentication_error")
        mine = client_of(url, api_key=alice)
        for _ in range(2):
            mine.models.list()
        limited = raised(openai.RateLimitError, mine.models.list)
        assert (limited["status"], limited["type"]) == (429, "rate_limit_error")


def test_what_the_server_cannot_do_is_a_class_of_the_client() -> None:
    held = Held(batch=BatchConfig(queue_items=1))
    with serving(held.app) as url:
        client = held.client(url)
        broken = raised(openai.InternalServerError, lambda: held.embed(client, "break"))
        assert broken == facts(500, "model_failed", None, "server_error")
        first = held.occupy(url)
        full = raised(openai.RateLimitError, lambda: held.embed(client))
        assert full == facts(429, "overloaded", None, "rate_limit_error")
        held.engine.opened.set()
        first.join()
        held.engine.opened.clear()
        hurried = {"x-request-timeout-seconds": "0.2"}
        late = raised(openai.InternalServerError, lambda: held.embed(client, extra_headers=hurried))
        assert late == facts(504, "deadline_exceeded", None, "timeout_error")
        held.engine.opened.set()
        held.engine.probe = TextAsk("break", "probe")
        ready = raised(openai.InternalServerError, lambda: client.get(f"{url}/ready", cast_to=object))
        assert ready == facts(503, "not_ready", None, "server_error")


def test_a_full_server_is_asked_again_when_it_said() -> None:
    """429 with `retry-after-ms` of a second: the client waits that long, and no longer than it has to."""
    held = Held(batch=BatchConfig(queue_items=1))
    with serving(held.app) as url:
        first = held.occupy(url)
        client = held.client(url, max_retries=3)
        opening = threading.Timer(0.5, held.engine.opened.set)
        opening.start()
        reply = held.embed(client, "second")
        first.join()
    assert len(reply.data) == 1
    assert [status for _, status in held.attempts] == [429, 200]
    waited = held.attempts[1][0] - held.attempts[0][0]
    assert 1.0 <= waited < 2.0
    assert held.engine.seen == ["first", "second"]


def test_what_would_fail_again_is_not_asked_again() -> None:
    held = Held()
    with serving(held.app) as url:
        client = held.client(url, max_retries=3)
        raised(openai.InternalServerError, lambda: held.embed(client, "break"))
        raised(openai.NotFoundError, lambda: client.models.retrieve("other"))
    assert [status for _, status in held.attempts] == [500, 404]
    assert held.engine.seen == ["break"]


def test_a_late_answer_is_asked_for_again() -> None:
    held = Held()
    with serving(held.app) as url:
        first = held.occupy(url)
        threading.Timer(0.6, held.engine.opened.set).start()
        client = held.client(url, max_retries=1)
        held.embed(client, "second", extra_headers={"x-request-timeout-seconds": "0.3"})
        first.join()
    assert [status for _, status in held.attempts] == [504, 200]
    assert held.engine.seen == ["first", "second"], "the late one was dropped before the model saw it"


def test_a_client_that_gives_up_is_not_computed_for() -> None:
    held = Held()
    with serving(held.app) as url:
        first = held.occupy(url)
        with pytest.raises(openai.APITimeoutError):
            held.embed(held.client(url), "given up", timeout=0.3)
        time.sleep(0.2)
        held.engine.opened.set()
        first.join()
        held.embed(held.client(url), "next")
    assert held.engine.seen == ["first", "next"]


def test_request_ids(client: openai.OpenAI) -> None:
    def ask(**headers: str) -> str | None:
        reply = client.embeddings.create(model="fmray-clip", input="a", extra_headers=headers)
        return reply._request_id

    assert ask(**{"x-request-id": "mine-7"}) == "mine-7"
    made = ask()
    assert made is not None
    assert made.startswith("req_")


def test_the_async_client(url: str) -> None:
    async def scene() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            replies = await asyncio.gather(
                *(client.embeddings.create(model="fmray-clip", input=[f"text {i}", RED]) for i in range(8))
            )
            assert all(len(reply.data) == 2 for reply in replies)
            stream = await client.chat.completions.create(
                model="fmray-mllm", messages=asked("what is it?", RED), stream=True, max_tokens=4
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason in ("stop", "length")
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("other")

    asyncio.run(scene())


# --------------------------------------------------------------------------------------- LangChain, LlamaIndex, openai 2

FRAMEWORKS = PeerEnvironment(
    "openai_clients",
    (
        ("langchain-openai==1.7.3", "llama-index-llms-openai-like==0.8.1", "openai==2.54.0"),
        ("llama-index-embeddings-openai-like==0.4.0",),
    ),
)
PARITY = Path(__file__).parent.parent.parent / ".parity"
SIDE = Path(__file__).parent / "frameworks_side.py"


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.timeout(600)
def test_langchain_and_llamaindex(url: str, client: openai.OpenAI) -> None:
    """Their own OpenAI classes, in an environment of their own (LlamaIndex wants the openai client of two versions ago)."""
    python = FRAMEWORKS.python(PARITY)
    command = [str(python), str(SIDE), f"{url}/v1", RED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    texts = ["a red heart", "blue"]
    ours = [item.embedding for item in client.embeddings.create(model="fmray-clip", input=texts).data]
    for framework in ("langchain", "llamaindex"):
        for mine, theirs in zip(ours, told[f"{framework} embeddings"], strict=True):
            assert theirs == pytest.approx(mine, abs=1e-6), framework
    whole = client.chat.completions.create(
        model="fmray-mllm", messages=asked("what is it?", RED), max_tokens=8
    )
    for name in ("langchain chat", "langchain stream", "llamaindex chat", "llamaindex stream"):
        assert told[name] == whole.choices[0].message.content, name
    # by default LangChain sends token ids of OpenAI's own tokenizer, which no other model can read
    assert told["langchain ids"]["status"] == 400
    assert "token ids are not supported" in told["langchain ids"]["message"]
    assert told["openai"].startswith("2.")
