"""What an endpoint of an answering model says of itself, and models that are damaged or of no kind that is served."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import save_file

from fmray.config.serving import ServeConfig
from fmray.errors import CheckpointError
from fmray.models.answering import load_answering
from fmray.serving.chat_engine import AnswerEngine
from fmray.serving.opening import Endpoint
from tests.endpoint import app_of
from tests.unit.serving.test_chat import CPU, ask, post, send
from tests.unit.serving.test_conversations import user
from tests.unit.serving.test_hostile_requests import check


@pytest.mark.parametrize(("kind", "name"), [("vqa", "a VQA model"), ("mllm", "a multimodal LLM")])
def test_routes_of_another_kind_say_what_is_served(
    kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    app = request.getfixturevalue(kind)
    for path in ("/v1/embeddings", "/v1/classify"):
        reply = post(app, {"model": f"fmray-{kind}", "input": "red", "labels": ["red"]}, path)
        check(reply, 404, "route_not_served", "model")
        line = f"{path} needs a model of kind clip; 'fmray-{kind}' is {name}: ask /v1/chat/completions"
        assert reply.json()["error"]["message"] == line


def test_chat_with_clip_says_what_is_served(client: httpx.Client) -> None:
    reply = client.post("/v1/chat/completions", json={"model": "tiny", "messages": [user("a")]})
    check(reply, 404, "route_not_served", "model")
    line = "/v1/chat/completions needs a model of kind vqa or mllm; 'tiny' is a dual encoder (CLIP): "
    assert (
        reply.json()["error"]["message"]
        == f"{line}ask /v1/embeddings or /v1/classify or /v1/rerank or /v1/score"
    )


def test_another_model_is_not_found(vqa: FastAPI) -> None:
    check(ask(vqa, "fmray-clip", user("a")), 404, "model_not_found", "model")


def test_models_say_what_they_can_do(vqa: FastAPI, mllm: FastAPI) -> None:
    limits = {"inputs": 2000, "images": 3, "body_mib": 20, "image_mib": 1, "image_megapixels": 1.0}
    common = {
        "modalities": ["text", "image"],
        "output": "text",
        "routes": ["/v1/chat/completions"],
        "dim": None,
        "image_size": 16,
        "limits": limits,
    }
    for app, own in (
        (vqa, {"kind": "vqa", "max_length": 12, "max_answer_tokens": 5}),
        (mllm, {"kind": "mllm", "max_length": 200, "max_answer_tokens": 8}),
    ):
        (model,) = send(app, "GET", "/v1/models").json()["data"]
        assert model["id"] == f"fmray-{own['kind']}"
        assert model["fmray"] == common | own
        assert send(app, "GET", f"/v1/models/{model['id']}").json() == model
        assert send(app, "GET", "/health").json() == {"status": "ok"}


@pytest.mark.parametrize("kind", ["vqa", "mllm"])
def test_warm_up_finds_damaged_weights(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    answering = load_answering(checkpoint, CPU)
    with torch.no_grad():
        next(p for name, p in answering.model.named_parameters() if "vision" in name).fill_(math.nan)
    with pytest.raises(
        CheckpointError, match=r"^the model's answers are not finite: its weights are damaged$"
    ):
        AnswerEngine(answering, kind, max_pixels=1).warmup()  # type: ignore[arg-type]


def test_a_model_that_breaks_later_is_the_servers_failure(mllm_checkpoint: str) -> None:
    answering = load_answering(mllm_checkpoint, CPU)
    app = app_of(AnswerEngine(answering, "mllm", max_pixels=10**6), "fmray-mllm")
    assert ask(app, "fmray-mllm", user("is it big?")).status_code == 200
    with torch.no_grad():
        answering.model.get_output_embeddings().weight.fill_(math.nan)
    check(ask(app, "fmray-mllm", user("is it big?")), 500, "model_failed", None)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            '{"model_type": "bert"}',
            "holds a bert model; what can be served are dual encoders (CLIP, SigLIP), ",
        ),
        ("[]", "its config.json cannot be read: "),
        ("{", "its config.json cannot be read: "),
    ],
)
def test_folders_that_cannot_be_served(tmp_path: Any, config: str, line: str) -> None:
    (tmp_path / "config.json").write_text(config)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Endpoint(ServeConfig(checkpoint=str(tmp_path)))
    assert str(caught.value).startswith(f"{tmp_path}: {line}")
    assert "\n" not in str(caught.value)
