"""Answering models as people serve them: `serve` in a process of its own, asked by the unmodified openai client."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from fmray.config.schema import RuntimeConfig
from fmray.config.serving import ServeConfig
from fmray.models.answering import Said, load_answering
from fmray.runtime.ports import free_port
from fmray.serving.images import pixels_of
from fmray.types import Dialogue, Pictures, Turn
from tests.e2e.test_serving import start, wait_until_up
from tests.endpoint import data_url, picture, save_answering
from tests.tiny_mllm import tiny_mllm
from tests.tiny_vqa import tiny_vqa

RED = picture("red")
QUESTIONS = {"vqa": "what color is the circle ?", "mllm": "what color is it?"}


class Served:
    """A saved model, its process and a client."""

    def __init__(self, kind: str, checkpoint: str, url: str) -> None:
        self.kind, self.checkpoint, self.url = kind, checkpoint, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="not-needed", max_retries=0)

    def directly(self) -> Said:
        answering = load_answering(self.checkpoint, torch.device("cpu"))
        pictures = Pictures(("0",), pixels_of([(RED, "")], answering.image, max_pixels=10**6))
        turn = Turn(("", QUESTIONS[self.kind]), "")
        return answering.answer([Dialogue("d", ("0",), (turn,))], pictures)[0]


@pytest.fixture(scope="module", params=["vqa", "mllm"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    answering = tiny_vqa(seed=2) if request.param == "vqa" else tiny_mllm(seed=3)
    checkpoint = save_answering(answering, tmp_path_factory.mktemp(request.param))
    config = ServeConfig(checkpoint=checkpoint, port=free_port(), runtime=RuntimeConfig(threads=1))
    url = f"http://127.0.0.1:{config.port}"
    with start(config) as process:
        try:
            wait_until_up(url, 60, process)
            yield Served(request.param, checkpoint, url)
        finally:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "ended\n"), err


def test_openais_client_gets_what_the_model_says(served: Served) -> None:
    (model,) = served.client.models.list()
    assert model.id == f"fmray-{served.kind}"
    reply = served.client.chat.completions.create(
        model=model.id,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(RED), "detail": "low"}},
                    {"type": "text", "text": QUESTIONS[served.kind]},
                ],
            }
        ],
        temperature=0,
        seed=1,
        user="u",
    )
    said = served.directly()
    (choice,) = reply.choices
    assert choice.message.content == said.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if said.ended else "length")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (said.prompt_tokens, said.tokens)
    if served.kind == "mllm":  # the answer goes back as the client dumps it
        talk = [{"role": "user", "content": "is it big?"}, choice.message.model_dump()]
        more = served.client.chat.completions.create(
            model=model.id,
            messages=[*talk, {"role": "user", "content": "sure?"}],  # type: ignore[list-item]
            max_completion_tokens=2,
        )
        assert more.usage is not None
        assert more.usage.completion_tokens <= 2


def test_a_stream_is_the_answer_in_pieces(served: Served) -> None:
    messages: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_url(RED)}},
                {"type": "text", "text": QUESTIONS[served.kind]},
            ],
        }
    ]
    stream = served.client.chat.completions.create(
        model=f"fmray-{served.kind}",
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    chunks = list(stream)
    said = served.directly()
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == said.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == ("stop" if said.ended else "length")
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (said.prompt_tokens, said.tokens)
    told = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs is not None]
    tokens = [token for each in told for token in each.content or []]
    assert len(tokens) == said.tokens - said.ended
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    assert all(token.top_logprobs[0].logprob == token.logprob for token in tokens), "greedy: the likeliest"


def test_refusals_are_the_clients_own_classes(served: Served) -> None:
    model, create = f"fmray-{served.kind}", served.client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(model=model, messages=[{"role": "user", "content": "hello"}], n=2)
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "n")
    with pytest.raises(openai.BadRequestError) as refused:
        create(model=model, messages=[{"role": "assistant", "content": "hello"}])
    assert refused.value.param == "messages[0]"
    with pytest.raises(openai.NotFoundError) as other:
        served.client.embeddings.create(model=model, input="hello")
    assert other.value.code == "route_not_served"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_readmes_curl(served: Served, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    url, question = data_url(RED), QUESTIONS[served.kind]
    body.write_text(
        f'{{"model": "fmray-{served.kind}", "messages": [{{"role": "user", "content": ['
        f'{{"type": "image_url", "image_url": {{"url": "{url}"}}}}, {{"type": "text", "text": "{question}"}}]}}]}}'
    )
    command = ["curl", "-s", f"{served.url}/v1/chat/completions", "-H", "content-type: application/json"]
    done = subprocess.run(
        [*command, "-d", f"@{body}"], capture_output=True, text=True, timeout=30, check=True
    )
    assert served.directly().text in done.stdout
    assert '"finish_reason"' in done.stdout
