"""`/v1/search` over a real socket: the nearest pictures of an index that the real door built, and every refusal."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from fmray.config.serving import ServeConfig
from fmray.pipeline.index import build_index
from fmray.serving.index_shelf import IndexShelf
from fmray.serving.index_store import checkpoint_hash, open_index
from fmray.serving.opening import Endpoint
from fmray.serving.shelf import EmbeddingModel
from tests.endpoint import data_url, picture, serving
from tests.unit.serving.index_folders import index_config, write_pictures

COLORS = {"kind": "folder", "template": "a {} thing"}


@pytest.fixture(scope="module")
def folders(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two indexes of the same pictures: plain files, and with captions but no thumbnails."""
    place = tmp_path_factory.mktemp("indexes")
    root = write_pictures(place / "pictures")
    build_index(index_config(checkpoint, root, place / "files"))
    source = {**COLORS, "path": str(root)}
    build_index(index_config(checkpoint, root, place / "captioned", source=source, thumbnail=0))
    return {name: str(place / name) for name in ("files", "captioned")}


def endpoint_of(checkpoint: str, indexes: dict[str, str]) -> Endpoint:
    """The whole endpoint of the tiny CLIP with its indexes."""
    limits = {"max_image_mib": 1, "max_image_megapixels": 1.0}
    return Endpoint(ServeConfig(checkpoint=checkpoint, model_id="tiny", indexes=indexes, **limits))


@contextmanager
def client_of(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with serving(endpoint.app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(checkpoint: str, folders: dict[str, str]) -> Iterator[httpx.Client]:
    with client_of(endpoint_of(checkpoint, folders)) as client:
        yield client


def search(
    client: httpx.Client, query: object, index: str | None = "files", **body: object
) -> dict[str, Any]:
    reply = client.post("/v1/search", json={"query": query, "index": index, **body})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def embedded(client: httpx.Client, value: object) -> np.ndarray:
    reply = client.post("/v1/embeddings", json={"model": "tiny", "input": value})
    return np.array(reply.json()["data"][0]["embedding"], dtype=np.float32)


def error(client: httpx.Client, body: object, status: int = 400) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    reply = client.post(
        "/v1/search", content=json.dumps(body), headers=headers
    )  # as ASCII: httpx refuses surrogates
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["error"]
    assert list(reply.json()["error"]) == ["message", "type", "param", "code"]
    return dict(reply.json()["error"])


# ------------------------------------------------------------------------------------------------ what is found


def test_the_nearest_are_those_of_the_embeddings_that_the_endpoint_gives(
    client: httpx.Client, folders: dict[str, str]
) -> None:
    opened = open_index(Path(folders["files"]))
    for query in ("a red thing", "blue", data_url(picture("green", (30, 20)))):
        reply = search(client, query, top_k=5)
        scores_N = opened._vectors_ND @ embedded(client, query)
        best = np.argsort(-scores_N, kind="stable")[:5]
        np.testing.assert_allclose([hit["score"] for hit in reply["data"]], scores_N[best], atol=1e-6)
        assert [hit["index"] for hit in reply["data"]] == [0, 1, 2, 3, 4]
        assert [reply[key] for key in ("object", "index", "model")] == ["list", "files", "tiny"]


def test_an_indexed_picture_finds_itself(client: httpx.Client) -> None:
    [hit] = search(client, data_url(picture("orange", (26, 24))), top_k=1)["data"]
    assert hit["id"] == "orange/1.png"
    assert hit["score"] == pytest.approx(1, abs=1e-5)
    assert set(hit) == {"index", "id", "score"}  # no caption, and no thumbnail that was not asked for


def test_every_shape_of_a_query_means_the_same(client: httpx.Client) -> None:
    url = data_url(picture("red"))
    text, image = search(client, "red"), search(client, url)
    for shape in ({"text": "red"}, {"type": "text", "text": "red"}):
        assert search(client, shape) == text
    for part in ({"image": url}, {"type": "image_url", "image_url": {"url": url}}, {"image_url": url}):
        assert search(client, part) == image
    assert text["usage"] == {"prompt_tokens": 5, "total_tokens": 5, "images": 0, "truncated": 0}
    assert image["usage"] == {"prompt_tokens": 0, "total_tokens": 0, "images": 1, "truncated": 0}


def test_captions_and_thumbnails_come_where_there_are_any(client: httpx.Client) -> None:
    reply = search(client, "red", "captioned", include=["thumbnails"], top_k=3)
    assert all(hit["caption"] == f"a {hit['id'].partition('/')[0]} thing" for hit in reply["data"])
    assert all("thumbnail" not in hit for hit in reply["data"])
    for hit in search(client, "red", include=["thumbnails"], top_k=3)["data"]:
        head, _, payload = hit["thumbnail"].partition(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(payload))).size == (96, 96)


def test_filters(client: httpx.Client) -> None:
    def ids(index: str, **filter: object) -> set[str]:
        return {hit["id"] for hit in search(client, "red", index, filter=filter, top_k=100)["data"]}

    assert ids("files", prefix="blue/") == {"blue/0.png", "blue/1.png"}
    assert ids("files", prefix="nobody/") == set()
    assert ids("captioned", caption="a red thing") == {"red/0.png", "red/1.png"}
    assert ids("captioned", caption=["a red thing", "a blue thing"], prefix="b") == {
        "blue/0.png",
        "blue/1.png",
    }
    assert ids("captioned", caption="red") == set()
    assert len(ids("files")) == 12


def test_the_indexes_are_listed(client: httpx.Client, checkpoint: str) -> None:
    first, second = client.get("/v1/indexes").json()["data"]
    assert 0 <= time.time() - first.pop("created") < 3600
    assert first == {
        "id": "files",
        "object": "index",
        "count": 12,
        "dim": 8,
        "kind": "flat",
        "thumbnails": True,
        "checkpoint": checkpoint_hash(checkpoint)[:12],
    }
    assert (second["id"], second["thumbnails"]) == ("captioned", False)


def test_the_routes_stand_in_the_openapi_document(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]["/v1/search"]) == {"post"}
    assert document["components"]["schemas"]["SearchRequest"]["properties"]["top_k"]["maximum"] == 100


# --------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"query": "a", "index": "nowhere"}, 404, "index_not_found", "index"),
        ({"query": "a", "index": "../../etc"}, 404, "index_not_found", "index"),
        ({"query": "a"}, 400, "missing_required_parameter", "index"),
        ({"index": "files"}, 400, "missing_required_parameter", "query"),
        ({"query": "a", "index": "files", "model": "gpt-4"}, 404, "model_not_found", "model"),
        ({"query": "a", "index": "files", "top_k": 10**6}, 400, "invalid_value", "top_k"),
        ({"query": "a", "index": "files", "top_k": 0}, 400, "invalid_value", "top_k"),
        ({"query": "a", "index": "files", "top_k": "5"}, 400, "invalid_value", "top_k"),
        ({"query": "a", "index": "files", "top_k": 1.5}, 400, "invalid_value", "top_k"),
        ({"query": " ", "index": "files"}, 400, "empty_input", "query"),
        ({"query": "x" * 200_000, "index": "files"}, 400, "context_length_exceeded", "query"),
        ({"query": ["a"], "index": "files"}, 400, "invalid_value", "query"),
        (
            {"query": {"image": "https://example.org/a.png"}, "index": "files"},
            400,
            "url_not_allowed",
            "query",
        ),
        ({"query": {"image": "file:///etc/passwd"}, "index": "files"}, 400, "url_not_allowed", "query"),
        ({"query": data_url(picture()[:60]), "index": "files"}, 400, "invalid_image", "query"),
        (
            {"query": data_url(picture(size=(1200, 1200))), "index": "files"},
            400,
            "image_too_large_pixels",
            "query",
        ),
        ({"query": "a", "index": "files", "filter": {"prefx": "b"}}, 400, "invalid_value", "filter"),
        ({"query": "a", "index": "files", "filter": {"prefix": 3}}, 400, "invalid_value", "filter"),
        ({"query": "a", "index": "files", "include": ["vectors"]}, 400, "invalid_value", "include[0]"),
        ({"query": "half a \ud800 pair", "index": "files"}, 400, "invalid_value", "query"),
    ],
)
def test_what_cannot_be_answered(
    client: httpx.Client, body: dict[str, object], status: int, code: str, param: str
) -> None:
    told = error(client, body, status)
    assert (told["code"], told["param"]) == (code, param)
    assert "\n" not in told["message"]


def test_one_index_need_not_be_named_and_none_is_said(checkpoint: str, folders: dict[str, str]) -> None:
    endpoint = endpoint_of(checkpoint, {"only": folders["files"]})
    with client_of(endpoint) as client:
        assert search(client, "red", None)["index"] == "only"
        (model,) = endpoint.shelf.models
        assert isinstance(model, EmbeddingModel)
        endpoint.shelf._models["tiny"] = replace(model, content_hash="another")  # as after a new checkpoint
        told = error(client, {"query": "red"}, 503)
        assert (told["code"], told["param"]) == ("index_outdated", "index")
    with client_of(endpoint_of(checkpoint, {})) as client:
        assert error(client, {"query": "red"}, 404)["code"] == "index_not_found"
        assert client.get("/v1/indexes").json() == {"object": "list", "data": []}


def test_an_index_built_anew_is_searched_without_a_restart_or_an_error(
    checkpoint: str, tmp_path: Path
) -> None:
    root = write_pictures(tmp_path / "pictures")
    config = index_config(checkpoint, root, tmp_path / "index")
    build_index(config)
    with client_of(endpoint_of(checkpoint, {"photos": str(tmp_path / "index")})) as client:
        assert len(search(client, "red", None, top_k=100)["data"]) == 12
        (root / "red" / "new.png").write_bytes(picture("red", (40, 24)))
        build_index(config)
        deadline, seen = time.monotonic() + 30, {12}
        while 13 not in seen and time.monotonic() < deadline:
            seen.add(len(search(client, "red", None, top_k=100, include=["thumbnails"])["data"]))
        assert seen == {12, 13}
        [hit] = search(client, data_url(picture("red", (40, 24))), None, top_k=1)["data"]
        assert hit["id"] == "red/new.png"


def test_open_files_do_not_grow_with_new_indexes(checkpoint: str, tmp_path: Path) -> None:
    config = index_config(checkpoint, write_pictures(tmp_path / "pictures", each=1), tmp_path / "index")
    build_index(config)
    served = {checkpoint_hash(checkpoint): 8}
    shelf = IndexShelf({"a": str(tmp_path / "index")}, served=served)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        build_index(config)
        shelf._look("a")  # what the watching thread does every second
    assert shelf.get("a")[1].facts == open_index(tmp_path / "index").facts
    assert len(os.listdir("/proc/self/fd")) <= before
