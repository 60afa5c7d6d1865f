"""The web page's files as they are sent: what they may load, how they are cached, and that nothing else is sent."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient

import fmray.serving
from fmray.config.loading import validate
from fmray.config.serving import ServeConfig
from fmray.errors import ConfigError
from fmray.serving.border import Border, install_error_answers
from fmray.serving.page_routes import FILES, PageRoutes

FOLDER = Path(fmray.serving.__file__).parent / "page"
ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(name for name in FILES if name.endswith(".js"))


def client_of(**config: Any) -> TestClient:
    app, router = FastAPI(redirect_slashes=False), APIRouter()
    PageRoutes(validate(ServeConfig, {"checkpoint": "none", **config})).add_to(router)
    app.include_router(router)
    app.add_middleware(Border, max_body=1000)
    install_error_answers(app)
    return TestClient(app)


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of()


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


PAGE = Tags((FOLDER / "index.html").read_text(encoding="utf-8")).tags


def address(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_sent_as_it_is_with_its_type_and_the_policy(client: TestClient, name: str) -> None:
    reply = client.get(address(name))
    assert (reply.status_code, reply.content) == (200, (FOLDER / name).read_bytes())
    assert reply.headers["content-type"] == FILES[name]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["cache-control"] == "no-cache"
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:"
    assert "unsafe" not in reply.headers["content-security-policy"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_a_browser_has_is_not_sent_again(client: TestClient, name: str) -> None:
    tag = client.get(address(name)).headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]{16}"', tag)
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        reply = client.get(address(name), headers={"if-none-match": known})
        assert (reply.status_code, reply.content) == (304, b""), known
        assert reply.headers["etag"] == tag
        assert "content-security-policy" in reply.headers
    assert client.get(address(name), headers={"if-none-match": '"other"'}).status_code == 200


def test_the_files_have_different_tags(client: TestClient) -> None:
    assert len({client.get(address(name)).headers["etag"] for name in FILES}) == len(FILES)


def test_head_answers_without_a_body(client: TestClient) -> None:
    reply = client.head("/")  # the border asks the route with GET; servers leave the body out
    assert reply.status_code == 200
    assert reply.headers["content-length"] == str(len((FOLDER / "index.html").read_bytes()))


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/nothing.js",
        "/page/..%2fkeys.py",
        "/page/%2e%2e/app.py",
        "/page/page.js/",
        "/page/__init__.py",
    ],
)
def test_nothing_else_is_sent(client: TestClient, path: str) -> None:
    reply = client.get(path)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "not_found"


def test_the_listed_files_are_those_of_the_folder() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)


def test_the_package_is_built_with_them() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["fmray"]
    sent = {path for pattern in patterns for path in (ROOT / "fmray").glob(pattern)}
    assert sent >= {FOLDER / name for name in FILES}


def test_without_the_page_nothing_of_it_is_there() -> None:
    client = client_of(page=False)
    for path in ("/", "/page/page.js", "/page/endpoint.json"):
        reply = client.get(path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


def test_the_page_is_no_part_of_the_api_document(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}


# ------------------------------------------------------------------------------------------- what the page is told


def test_what_the_page_is_told() -> None:
    assert client_of().get("/page/endpoint.json").json() == {"bases": [""], "key": False}
    told = client_of(page_bases=["/clip", "/vqa/"], access={"key_file": "/keys.yaml"})
    assert told.get("/page/endpoint.json").json() == {"bases": ["", "/clip", "/vqa/"], "key": True}


@pytest.mark.parametrize(
    "base", ["https://elsewhere.example/", "//elsewhere.example", "vqa", "", "/a//b", "/a?b", "/a b"]
)
def test_a_base_is_a_path_of_the_same_host(base: str) -> None:
    with pytest.raises(ConfigError, match="page_bases"):
        validate(ServeConfig, {"checkpoint": "none", "page_bases": [base]})


# --------------------------------------------------------------------------------------------- what the files hold


def test_the_page_holds_no_script_or_style_of_its_own() -> None:
    for tag, attributes in PAGE:
        assert tag != "style"
        assert tag != "script" or attributes.get("src"), "an inline script"
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (
            tag,
            attributes,
        )
    assert (FOLDER / "index.html").read_text(encoding="utf-8").count("<script") == 1


def test_what_the_page_loads_is_below_its_own_address() -> None:
    loaded = [
        str(attributes[name])
        for _, attributes in PAGE
        for name in ("src", "href", "action", "srcset", "data", "poster")
        if name in attributes
    ]
    assert {f"page/{name}" for name in ("page.js", "page.css", "icon.svg")} | {"#work"} == set(loaded)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_loads_only_its_neighbours_and_writes_no_markup(name: str) -> None:
    code = (FOLDER / name).read_text(encoding="utf-8")
    for imported in re.findall(r'\bfrom "([^"]+)"', code):
        assert imported.startswith("./"), imported
        assert imported.removeprefix("./") in FILES, imported
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|import\(", code
    )
    assert not re.findall(r"localStorage|document\.cookie|indexedDB|sendBeacon|WebSocket|EventSource", code)
    assert "console." not in code


def test_no_file_names_another_host() -> None:
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        named = set(re.findall(r"\b(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text)) - {"http://www.w3.org"}
        assert not named, (name, named)
        assert name == "icon.svg" or "http://" not in text.replace("http://www.w3.org/2000/svg", "")


def test_every_stylesheet_rule_stays_here() -> None:
    assert not re.findall(r"@import|url\(", (FOLDER / "page.css").read_text(encoding="utf-8"))


def test_every_control_has_a_name() -> None:
    """By a label around it, a label that names it, or an attribute; hidden buttons have words."""
    text = (FOLDER / "index.html").read_text(encoding="utf-8")
    labelled = {attributes.get("for") for tag, attributes in PAGE if tag == "label"}
    inside = set(re.findall(r'<label[^>]*>(?:(?!</label>).)*?id="([\w-]+)"', text, re.DOTALL))
    for tag, attributes in PAGE:
        if tag in ("input", "textarea", "select"):
            assert attributes["id"] in labelled | inside, attributes
        if tag == "img":
            assert "alt" in attributes
    identities = [attributes["id"] for _, attributes in PAGE if "id" in attributes]
    assert len(identities) == len(set(identities))
    for _, attributes in PAGE:
        for name in ("aria-controls", "aria-labelledby", "aria-describedby", "for"):
            assert attributes.get(name) is None or attributes[name] in identities, attributes


def test_the_page_is_small() -> None:
    assert sum(len((FOLDER / name).read_bytes()) for name in FILES) < 60_000
