"""Every route over a real socket: shapes, options, headers, errors."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.endpoint import data_url, picture

RED, BLUE = data_url(picture("red")), data_url(picture("blue"))


def embed(client: httpx.Client, value: object, **options: object) -> dict[str, Any]:
    reply = client.post("/v1/embeddings", json={"model": "tiny", "input": value, **options})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def vectors(client: httpx.Client, value: object, **options: object) -> np.ndarray:
    return np.array([item["embedding"] for item in embed(client, value, **options)["data"]])


def error(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["error"]
    assert list(reply.json()["error"]) == ["message", "type", "param", "code"]
    assert reply.headers["x-request-id"]
    return dict(reply.json()["error"])


# ------------------------------------------------------------------------------------------------ embeddings


def test_every_shape_of_an_input_means_the_same(client: httpx.Client) -> None:
    text, image = vectors(client, "red"), vectors(client, RED)
    same_text: list[object] = [
        ["red"],
        {"text": "red"},
        [{"type": "text", "text": "red"}],
    ]
    same_image: list[object] = [
        [RED],
        {"image": RED},
        [{"type": "image_url", "image_url": {"url": RED, "detail": "auto"}}],
        [{"image_url": RED}],
    ]
    for shape in same_text:
        np.testing.assert_allclose(vectors(client, shape), text, atol=1e-6)
    for shape in same_image:
        np.testing.assert_allclose(vectors(client, shape), image, atol=1e-6)
    np.testing.assert_allclose(vectors(client, RED, modality="image"), image, atol=1e-6)
    mixed = vectors(client, ["red", RED, {"text": "red"}, {"image": RED}])
    np.testing.assert_allclose(mixed, np.concatenate([text, image] * 2), atol=1e-6)


def test_the_reply_is_openais(client: httpx.Client) -> None:
    reply = embed(client, ["red", RED, "a" * 100], user="u", store=True, seed=3, unheard_of={"x": 1})
    assert {key: reply[key] for key in ("object", "model")} == {"object": "list", "model": "tiny"}
    assert [(item["object"], item["index"]) for item in reply["data"]] == [("embedding", i) for i in range(3)]
    assert reply["usage"] == {"prompt_tokens": 17, "total_tokens": 17, "images": 1, "truncated": 1}


def test_base64_is_little_endian_float32(client: httpx.Client) -> None:
    plain = vectors(client, ["red", RED]).astype("<f4")
    encoded = embed(client, ["red", RED], encoding_format="base64")["data"]
    for row, item in zip(plain, encoded, strict=True):
        assert base64.b64decode(item["embedding"]) == row.tobytes()


def test_dimensions_truncate_and_scale_again(client: httpx.Client) -> None:
    whole = vectors(client, "red")
    np.testing.assert_allclose(vectors(client, "red", dimensions=8), whole, atol=1e-6)
    head = whole[:, :3] / np.linalg.norm(whole[:, :3])
    np.testing.assert_allclose(vectors(client, "red", dimensions=3), head, atol=1e-6)
    for wrong in (0, -1, 9, 2.5, "3", True, 10**30):
        body = {"model": "tiny", "input": "red", "dimensions": wrong}
        assert error(client.post("/v1/embeddings", json=body), 400)["param"] == "dimensions"


def test_more_items_than_a_batch_stay_in_order(client: httpx.Client) -> None:
    texts = [f"text {i}" for i in range(150)]
    together = vectors(client, texts)
    np.testing.assert_allclose(
        together[[0, 63, 64, 127, 128, 149]],
        np.concatenate([vectors(client, texts[i]) for i in (0, 63, 64, 127, 128, 149)]),
        atol=1e-6,
    )


def test_vllms_messages_become_one_vector(client: httpx.Client) -> None:
    """A message of the user with one text or one picture, as a plain string or as a part."""
    for content, same in (
        ("red", "red"),
        ([{"type": "text", "text": "red"}], "red"),
        ([{"type": "image_url", "image_url": {"url": RED}}], RED),
    ):
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "encoding_format": "float",
        }
        reply = client.post("/v1/embeddings", json=body)
        assert reply.status_code == 200, reply.text
        (item,) = reply.json()["data"]
        np.testing.assert_allclose([item["embedding"]], vectors(client, same), atol=1e-6)


def user(*parts: object) -> list[object]:
    return [{"role": "user", "content": list(parts)}]


TEXT_PART = {"type": "text", "text": "red"}
BAD_MESSAGES: dict[str, tuple[dict[str, object], str, str]] = {
    "none": ({"messages": []}, "invalid_value", "messages"),
    "null": ({"messages": None}, "invalid_value", "messages"),
    "two": ({"messages": user(TEXT_PART) * 2}, "invalid_value", "messages"),
    "an assistant's": ({"messages": [{"role": "assistant", "content": "a"}]}, "invalid_value", "messages"),
    "of two parts": ({"messages": user(TEXT_PART, TEXT_PART)}, "invalid_value", "messages[0].content"),
    "of nothing": ({"messages": user()}, "invalid_value", "messages[0].content"),
    "empty text": ({"messages": [{"role": "user", "content": " "}]}, "empty_input", "messages[0]"),
    "of audio": ({"messages": user({"type": "input_audio"})}, "invalid_value", "messages[0].content[0]"),
    "a bad picture": (
        {"messages": user({"image_url": {"url": "data:image/png;base64,AAAA"}})},
        "unsupported_image_format",
        "messages[0]",
    ),
    "beside an input": ({"messages": user(TEXT_PART), "input": "a"}, "invalid_value", "messages"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_messages_that_are_no_one_thing(client: httpx.Client, name: str) -> None:
    body, code, param = BAD_MESSAGES[name]
    told = error(client.post("/v1/embeddings", json={"model": "tiny", **body}), 400)
    assert (told["code"], told["param"]) == (code, param), told


def test_a_long_text_is_refused_where_the_client_wants_that(client: httpx.Client) -> None:
    body = {"model": "tiny", "input": ["red", "a" * 100], "truncate": False}
    told = error(client.post("/v1/embeddings", json=body), 400)
    assert (told["code"], told["param"]) == ("context_length_exceeded", "input[1]")


# -------------------------------------------------------------------------------------------------- classify


def classify(client: httpx.Client, **body: object) -> dict[str, Any]:
    reply = client.post("/v1/classify", json={"model": "tiny", "input": RED, "template": "{}", **body})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_labels_come_best_first_and_sum_to_one(client: httpx.Client) -> None:
    reply = classify(client, input=[RED, {"image": BLUE}], labels=["a", "bb", "ccc"])
    assert reply["usage"] == {"prompt_tokens": 3 + 4 + 5, "total_tokens": 12, "images": 2, "truncated": 0}
    for index, item in enumerate(reply["data"]):
        scores = [prob["score"] for prob in item["probs"]]
        assert item["index"] == index
        assert item["label"] == item["probs"][0]["label"]
        assert {prob["label"] for prob in item["probs"]} == {"a", "bb", "ccc"}
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-5)
    top = classify(client, input=[RED, BLUE], labels=["a", "bb", "ccc"], top_k=1)
    assert [item["probs"] for item in top["data"]] == [item["probs"][:1] for item in reply["data"]]
    assert len(classify(client, labels=["a"], top_k=5)["data"][0]["probs"]) == 1


def test_scores_are_the_models_own(client: httpx.Client) -> None:
    """softmax(scale · cosine) of what /v1/embeddings says, with a scale of 1 / 0.2 (tests/tiny.py)."""
    labels = ["a", "bb", "ccc"]
    sentences = [[f"a {label}" for label in labels], [f"{label}!" for label in labels]]
    ensemble = sum(vectors(client, texts) for texts in sentences)
    ensemble = ensemble / np.linalg.norm(ensemble, axis=1, keepdims=True)
    logits = 5 * vectors(client, RED) @ ensemble.T
    expected = np.exp(logits) / np.exp(logits).sum()
    probs = classify(client, labels=labels, template=["a {}", "{}!"])["data"][0]["probs"]
    assert {prob["label"]: prob["score"] for prob in probs} == pytest.approx(
        dict(zip(labels, expected[0], strict=True)), abs=1e-5
    )


def test_labels_that_were_known_are_counted(client: httpx.Client) -> None:
    def counted() -> list[float]:
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("fmray_cache_")]
        return [float(line.rpartition(" ")[2]) for line in sorted(lines)]

    classify(client, labels=["never asked before", "nor this"])
    before = counted()
    classify(client, labels=["never asked before", "nor this", "but this"])
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [2, 1]


def test_each_label_by_itself(client: httpx.Client) -> None:
    both = classify(client, labels=["a", "bb"], multi_label=True)["data"][0]["probs"]
    alone = classify(client, labels=["a"], multi_label=True)["data"][0]["probs"]
    assert next(prob for prob in both if prob["label"] == "a")["score"] == pytest.approx(alone[0]["score"])


@pytest.mark.parametrize("value", ["a red heart", {"text": "a"}, [RED, "a"], "https://example.com/a.png"])
def test_only_images_are_classified(client: httpx.Client, value: object) -> None:
    body = {"model": "tiny", "input": value, "labels": ["a"]}
    told = error(client.post("/v1/classify", json=body), 400)
    assert str(told["param"]).startswith("input[")


# ------------------------------------------------------------------------------- models, health, ids, errors


def test_models_and_health(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/tiny").json() == model
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "fmray")
    assert {key: model["fmray"][key] for key in ("dim", "max_length", "image_size")} == {
        "dim": 8,
        "max_length": 12,
        "image_size": 16,
    }
    assert error(client.get("/v1/models/org/other"), 404)["code"] == "model_not_found"
    assert client.get("/openapi.json").status_code == 200


@pytest.mark.parametrize("route", ["/v1/embeddings", "/v1/classify"])
def test_another_model_is_not_found(client: httpx.Client, route: str) -> None:
    told = error(client.post(route, json={"model": "gpt-4" * 99, "input": RED, "labels": ["a"]}), 404)
    assert (told["type"], told["code"], told["param"]) == ("not_found_error", "model_not_found", "model")
    assert len(told["message"]) < 250


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/page/other.js", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
        ("GET", "/v1/embeddings", 405, "method_not_allowed"),
    ],
)
def test_routes_that_are_not_there(
    client: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    assert error(client.request(method, path), status)["code"] == code


def test_request_ids_are_echoed_or_made(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    made = {client.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    for smuggled in ("a b", "x" * 129, '<script>"'):
        echoed = client.get("/nothing", headers={"x-request-id": smuggled}).headers["x-request-id"]
        assert echoed.startswith("req_")


# --------------------------------------------------------------------------------------- the size of a body


def body_of(size: int) -> bytes:
    text = b'{"model": "tiny", "input": "red", "user": "'
    return text + b"x" * (size - len(text) - 2) + b'"}'


def test_a_body_may_be_as_large_as_the_limit(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    limit = 4 * 2**20
    assert client.post("/v1/embeddings", content=body_of(limit), headers=headers).status_code == 200
    told = error(client.post("/v1/embeddings", content=body_of(limit + 1), headers=headers), 413)
    assert (told["code"], told["message"]) == ("request_too_large", "the body has more than 4 MiB")


def test_a_chunked_body_is_counted_while_it_is_read(client: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(3 * 64):  # three times the limit
            sent += 2**16
            yield b" " * 2**16

    headers = {"content-type": "application/json"}
    assert error(client.post("/v1/embeddings", content=endless(), headers=headers), 413)
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_other_content_types_are_refused(client: httpx.Client, kind: str) -> None:
    reply = client.post("/v1/embeddings", content=body_of(100), headers={"content-type": kind})
    assert error(reply, 415)["code"] == "unsupported_media_type"
