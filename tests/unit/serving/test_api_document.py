"""The API's document, the page that shows it, and the routes' other names: every example can be sent as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

import fmray
from fmray.config.serving import AccessConfig, ServeConfig
from fmray.serving.api_document import ERROR_STATUSES, operations
from fmray.serving.docs_page import docs_page
from fmray.serving.keys import KeyFile
from fmray.serving.opening import Endpoint
from tests.endpoint import serving
from tests.whole_endpoint import whole_config

ROUTES = {
    "POST /v1/embeddings",
    "POST /v1/classify",
    "POST /v1/rerank",
    "POST /v1/score",
    "POST /v1/chat/completions",
    "POST /v1/search",
    "GET /v1/indexes",
    "GET /v1/models",
    "GET /v1/models/{model_id}",
    "GET /health",
    "GET /ready",
    "GET /version",
    "GET /metrics",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    return whole_config(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def client(config: ServeConfig) -> Iterator[httpx.Client]:
    with serving(Endpoint(config).app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


def schema_of(document: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """The schema that some content refers to, with its neighbours beside it."""
    found = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    return {**found, "components": document["components"]}


# ------------------------------------------------------------------------------------------------------- document


def test_every_route_stands_in_it_with_its_errors(document: dict[str, Any]) -> None:
    found = {f"{method} {path}": operation for path, method, operation in operations(document)}
    assert set(found) == ROUTES
    for name, operation in found.items():
        assert operation["description"], name
        errors = {int(status) for status in operation["responses"]} - {200}
        missing = set(ERROR_STATUSES) - errors
        assert missing == ({415} if name.startswith("GET") else set()) | (
            {401, 429} if name in ("GET /health", "GET /ready") else set()
        ), name
        for status in errors:
            reply = operation["responses"][str(status)]
            assert reply["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorReply")
            assert "x-request-id" in reply["headers"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert document["info"]["version"] == fmray.__version__
    assert "securitySchemes" not in document["components"]


def test_every_example_can_be_sent_and_looks_like_what_comes_back(
    client: httpx.Client, document: dict[str, Any]
) -> None:
    sent = 0
    for path, method, operation in operations(document):
        reply_schema: dict[str, Any] | None = None
        content = operation["responses"]["200"]["content"]
        if "application/json" in content and method == "POST":
            reply_schema = schema_of(document, content["application/json"])
            for example in reply_schema.get("examples", []):
                jsonschema.validate(example, reply_schema)
        if "requestBody" not in operation:
            continue
        assert reply_schema is not None
        schema = schema_of(document, operation["requestBody"]["content"]["application/json"])
        assert schema["examples"], path
        for example in schema["examples"]:
            jsonschema.validate(example, schema)
            reply = client.post(path, json=example)
            assert reply.status_code == 200, (path, reply.text)
            jsonschema.validate(reply.json(), reply_schema)
            sent += 1
    assert sent >= 8


def test_error_examples_are_errors(document: dict[str, Any], client: httpx.Client) -> None:
    replies = document["paths"]["/v1/embeddings"]["post"]["responses"]
    for status, reply in replies.items():
        if status != "200":
            content = reply["content"]["application/json"]
            jsonschema.validate(content["example"], schema_of(document, content))
    told = client.post("/v1/embeddings", json={"model": "x", "input": "a"}).json()["error"]
    assert replies["404"]["content"]["application/json"]["example"]["error"]["type"] == told["type"]


def test_with_keys_it_says_so_and_needs_one(config: ServeConfig, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.yaml")
    key = {"authorization": f"Bearer {file.add('alice')}"}
    guarded = config.replace(more={}, indexes={}, access=AccessConfig(key_file=str(file.path)))
    with serving(Endpoint(guarded).app) as url, httpx.Client(base_url=url) as client:
        for path in ("/openapi.json", "/docs", "/version", "/models", "/embeddings"):
            assert client.get(path).status_code == 401, path
        document = client.get("/openapi.json", headers=key).json()
        assert client.get("/docs", headers=key).status_code == 200
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        secured = {path for path, _, operation in operations(document) if "security" in operation}
        assert secured == set(document["paths"]) - {"/health", "/ready"}


# ------------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a page holds and where it points."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.add(str(value))
            elif name in ("href", "src", "action", "data"):
                self.links.append(str(value))


def test_the_page_shows_every_route_and_loads_nothing(client: httpx.Client) -> None:
    reply = client.get("/docs")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert reply.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    page = Page(reply.text)
    assert not {"script", "link", "img", "iframe", "form"} & set(page.tags)
    for link in page.links:
        assert link == "/openapi.json" or link.removeprefix("#") in page.ids, link
    assert len(page.ids) == len(ROUTES)
    for word in ("encoding_format", "top_logprobs", "a red heart", "not answered within its time"):
        assert word in reply.text, word
    for gone in ("/redoc", "/docs/oauth2-redirect"):
        assert client.get(gone).status_code == 404


def test_what_the_document_says_is_text_to_the_page(document: dict[str, Any]) -> None:
    hostile = {**document, "info": {**document["info"], "description": "<script>alert(1)</script>`<b>`"}}
    shown = docs_page(hostile, '/base"><script>')
    assert "<script" not in shown
    assert "<code>&lt;b&gt;</code>" in shown


# ---------------------------------------------------------------------------------------------------- other names


def test_routes_without_v1_answer_the_same(client: httpx.Client, document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        if not path.startswith("/v1/"):
            continue
        short = path.removeprefix("/v1").replace("{model_id}", "fmray-vqa")
        assert short not in document["paths"]
        long = path.replace("{model_id}", "fmray-vqa")
        body = None
        if method == "POST":
            body = schema_of(document, operation["requestBody"]["content"]["application/json"])["examples"][0]
        replies = [client.request(method, where, json=body).json() for where in (long, short)]
        for reply in replies:
            reply.pop("id", None), reply.pop("created", None)
        assert replies[0] == replies[1]
        assert "error" not in replies[0]
    body = {"model": "fmray-clip", "query": "a", "documents": ["b", "c"]}
    assert client.post("/v2/rerank", json=body).json() == client.post("/v1/rerank", json=body).json()


def test_the_version(client: httpx.Client) -> None:
    assert client.get("/version").json() == {"version": fmray.__version__}
    assert re.fullmatch(r"\d+\.\d+\.\d+", fmray.__version__)
