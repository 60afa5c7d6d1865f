"""What strangers send: each gets its documented answer, which tells nothing of the inside."""

from __future__ import annotations

import json
import struct
import zlib

import httpx
import pytest

from tests.endpoint import data_url, picture

PNG = picture(size=(64, 64))
JPEG = picture(size=(64, 64), kind="JPEG")
HEADERS = {"content-type": "application/json"}


def png_of_size(width: int, height: int, rows: bytes = b"") -> bytes:
    """A 1-bit PNG that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def check(reply: httpx.Response, status: int, code: str, param: str | None) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert isinstance(error["message"], str)
    assert len(error["message"]) < 500
    for inside in ("Traceback", "0x", 'File "', "site-packages", "object at", "pydantic"):
        assert inside not in reply.text


# every kind is in test_images_bytes; here, that its answer reaches the client
BAD_IMAGES = {
    "bomb": (png_of_size(50_000, 50_000, zlib.compress(b"\0" * 6251 * 1000)), "image_too_large_pixels"),
    "just too many pixels": (picture(size=(1001, 1000)), "image_too_large_pixels"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "invalid_image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", "unsupported_image_format"),
    "empty": (b"", "invalid_image"),
    "too many bytes": (PNG + b"\0" * 2**20, "image_too_large"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("route", ["/v1/embeddings", "/v1/classify"])
def test_bad_images(client: httpx.Client, route: str, name: str) -> None:
    data, code = BAD_IMAGES[name]
    body = {"model": "tiny", "input": [data_url(PNG), data_url(data)], "labels": ["a"]}
    check(client.post(route, json=body), 400, code, "input[1]")


GOOD_IMAGES = {
    "one pixel": picture(size=(1, 1)),
    "one row": picture(size=(300, 1)),
    "jpeg": JPEG,
    "with a tail": PNG + b"<script>alert(1)</script>",
    "exactly the limit": picture(size=(1000, 1000)),
}


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_odd_but_good_images(client: httpx.Client, name: str) -> None:
    body = {"model": "tiny", "input": data_url(GOOD_IMAGES[name], "image/x-wrong")}
    assert client.post("/v1/embeddings", json=body).status_code == 200


BAD_BODIES: dict[str, tuple[object, str, str | None]] = {
    "nothing": ({}, "missing_required_parameter", "model"),
    "no input": ({"model": "tiny"}, "missing_required_parameter", "input"),
    "model is a number": ({"model": 3, "input": "a"}, "invalid_value", "model"),
    "input is null": ({"model": "tiny", "input": None}, "invalid_value", "input[0]"),
    "input is a number": ({"model": "tiny", "input": 7}, "invalid_value", "input[0]"),
    "empty list": ({"model": "tiny", "input": []}, "empty_input", "input"),
    "empty string": ({"model": "tiny", "input": ["a", ""]}, "empty_input", "input[1]"),
    "white space": ({"model": "tiny", "input": " \n\t"}, "empty_input", "input[0]"),
    "token ids": ({"model": "tiny", "input": [1, 2, 3]}, "invalid_value", "input[0]"),
    "lists of token ids": ({"model": "tiny", "input": [[1, 2], [3]]}, "invalid_value", "input[0]"),
    "nested lists": ({"model": "tiny", "input": ["a", ["b"]]}, "invalid_value", "input[1]"),
    "part without content": ({"model": "tiny", "input": [{"type": "text"}]}, "invalid_value", "input[0]"),
    "part of audio": (
        {"model": "tiny", "input": [{"type": "input_audio", "input_audio": {}}]},
        "invalid_value",
        "input[0]",
    ),
    "part of a number": ({"model": "tiny", "input": ["a", {"text": 4}]}, "invalid_value", "input[1]"),
    "url of a list": ({"model": "tiny", "input": [{"image_url": ["x"]}]}, "invalid_value", "input[0]"),
    "web address": (
        {"model": "tiny", "input": ["a", {"image_url": {"url": "http://localhost/"}}]},
        "url_not_allowed",
        "input[1]",
    ),
    "svg data url": (
        {"model": "tiny", "input": ["a", "b", "c", "data:image/svg+xml;base64,PHN2Zy8+"]},
        "unsupported_image_format",
        "input[3]",
    ),
    "not base64": (
        {"model": "tiny", "input": ["a", "data:image/png;base64,!!!!"]},
        "invalid_image",
        "input[1]",
    ),
    "2049 inputs": ({"model": "tiny", "input": ["a"] * 2049}, "too_many_inputs", "input"),
    "70000 inputs": ({"model": "tiny", "input": ["a"] * 70_000}, "invalid_value", "input"),
    "long text": ({"model": "tiny", "input": "a " * 70_000}, "context_length_exceeded", "input[0]"),
    "unknown encoding": (
        {"model": "tiny", "input": "a", "encoding_format": "hex"},
        "invalid_value",
        "encoding_format",
    ),
    "no normalisation": ({"model": "tiny", "input": "a", "normalize": False}, "invalid_value", "normalize"),
    "a list": ([1, 2], "invalid_json", None),
    "a string": ("hello", "invalid_json", None),
    "null": (None, "invalid_json", None),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies(client: httpx.Client, name: str) -> None:
    body, code, param = BAD_BODIES[name]
    check(client.post("/v1/embeddings", content=json.dumps(body), headers=HEADERS), 400, code, param)


RAW_BODIES = {
    "empty": (b"", "invalid_json", None),
    "half": (b'{"model": "tiny", "inp', "invalid_json", None),
    "not text": (b"\xff\xfe\x00\x01", "invalid_json", None),
    "deep": (b"[" * 200_000, "invalid_request", None),
    "deep input": (
        b'{"model": "tiny", "input": ' + b'[{"a":' * 20_000 + b"1" + b"}]" * 20_000 + b"}",
        "invalid_request",
        None,
    ),
    "NaN": (b'{"model": "tiny", "input": "a", "dimensions": NaN}', "invalid_value", "dimensions"),
    "infinity": (b'{"model": "tiny", "input": [Infinity]}', "invalid_value", "input[0]"),
    "lone surrogate": (b'{"model": "tiny", "input": "\\ud800"}', "invalid_value", "input[0]"),
    "lone surrogate as the model": (b'{"model": "\\ud800", "input": "a"}', "invalid_value", "model"),
    "lone surrogate in a url": (
        b'{"model": "tiny", "input": {"image": "data:image/png;base64,%\\ud800"}}',
        "invalid_value",
        "input[0]",
    ),
    "long number": (
        b'{"model": "tiny", "input": "a", "dimensions": ' + b"9" * 4000 + b"}",
        "invalid_value",
        "dimensions",
    ),
    "many brackets": (
        b'{"model": "tiny", "input": [' + b"[]," * 200_000 + b"1]}",
        "invalid_value",
        "input[0]",
    ),
}


@pytest.mark.parametrize("name", RAW_BODIES)
def test_raw_bodies(client: httpx.Client, name: str) -> None:
    body, code, param = RAW_BODIES[name]
    check(client.post("/v1/embeddings", content=body, headers=HEADERS), 400, code, param)


ODD_TEXTS = ["\0", "a\0b", "<|endoftext|>", "[CLS] [SEP]", "🧡" * 50, "‮مرحبا", "a" * 100_000, "data: new oil"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_are_only_texts(client: httpx.Client, text: str) -> None:
    reply = client.post("/v1/embeddings", json={"model": "tiny", "input": text})
    assert reply.status_code == 200
    assert reply.json()["usage"]["prompt_tokens"] <= 12


BAD_LABELS: dict[str, tuple[dict[str, object], str, str]] = {
    "none": ({}, "missing_required_parameter", "labels"),
    "a string": ({"labels": "cat"}, "invalid_value", "labels"),
    "empty": ({"labels": []}, "empty_input", "labels"),
    "1001": ({"labels": [str(i) for i in range(1001)]}, "too_many_inputs", "labels"),
    "70000": ({"labels": ["a"] * 70_000}, "invalid_value", "labels"),
    "twice": ({"labels": ["a", "a"]}, "invalid_value", "labels[1]"),
    "a number": ({"labels": ["a", 3]}, "invalid_value", "labels[1]"),
    "template of a number": ({"labels": ["a"], "template": [3]}, "invalid_value", "template[0]"),
    "template without a place": ({"labels": ["a"], "template": "{0}"}, "invalid_value", "template"),
    "half a surrogate": ({"labels": ["a", "\ud800"]}, "invalid_value", "labels[1]"),
    "template of half a surrogate": (
        {"labels": ["a"], "template": "{} \ud800"},
        "invalid_value",
        "template[0]",
    ),
    "top 0": ({"labels": ["a"], "top_k": 0}, "invalid_value", "top_k"),
    "multi_label of text": ({"labels": ["a"], "multi_label": "yes"}, "invalid_value", "multi_label"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels(client: httpx.Client, name: str) -> None:
    options, code, param = BAD_LABELS[name]
    body = {"model": "tiny", "input": data_url(PNG), **options}
    check(client.post("/v1/classify", content=json.dumps(body), headers=HEADERS), 400, code, param)
