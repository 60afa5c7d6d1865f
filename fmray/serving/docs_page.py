"""`/docs`: the API's document as one page of HTML, made here: no script, and nothing that comes from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import HTMLResponse

from fmray.serving.api_document import operations

STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
:root { color-scheme: light dark }
h2 { margin-top: 3rem; border-bottom: 1px solid #8888 }
code, pre { font-family: ui-monospace, monospace; font-size: .9em }
pre { background: #8882; padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #8884 }
nav ul { padding: 0 }
nav li { display: inline-block; margin-right: 1rem }
"""
_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_DIGEST}'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class DocsRoutes:
    """The page about the document of one app. Where keys are asked for, it needs one, like `/openapi.json`."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def add_to(self, router: APIRouter) -> None:
        """This route; not in the document."""
        router.get("/docs", include_in_schema=False)(self.docs)

    async def docs(self, request: Request) -> HTMLResponse:
        """Every route with its fields, examples and errors."""
        base = str(request.scope.get("root_path", ""))
        return HTMLResponse(docs_page(self._app.openapi(), base), headers=HEADERS)


def docs_page(document: dict[str, Any], base: str = "") -> str:
    """The page. base: path below which the app is mounted."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}: the API")
    anchors = [(_anchor(method, path), f"{method} {path}") for path, method, _ in operations(document)]
    links = "".join(
        f'<li><a href="#{anchor}"><code>{escape(name)}</code></a></li>' for anchor, name in anchors
    )
    routes = "".join(
        _route(document, path, method, operation) for path, method, operation in operations(document)
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><main><h1>{title}</h1>{_prose(info['description'])}"
        f'<p>For programs: <a href="{escape(base)}/openapi.json">openapi.json</a></p>'
        f'<nav aria-label="Routes"><ul>{links}</ul></nav>\n{routes}</main></body></html>\n'
    )


def _route(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    pieces = [f'<h2 id="{_anchor(method, path)}"><code>{method} {escape(path)}</code></h2>\n']
    pieces.append(_prose(operation.get("description", "")))
    if "requestBody" in operation:
        schema = _content_schema(document, operation["requestBody"])
        pieces.append(_table("Field", "Meaning", _fields(schema)))
        for example in schema.get("examples", ()):
            pieces.append(f"<p>Request:</p>{_json(example)}")
    reply = operation["responses"]["200"]
    schema = _content_schema(document, reply)
    for example in schema.get("examples", ()):
        pieces.append(f"<p>Reply:</p>{_json(example)}")
    errors = (
        (status, each["description"]) for status, each in operation["responses"].items() if status != "200"
    )
    pieces.append(f"<details><summary>Errors</summary>{_table('Status', 'Meaning', errors)}</details>\n")
    return "".join(pieces)


def _content_schema(document: dict[str, Any], holder: dict[str, Any]) -> dict[str, Any]:
    schema = holder.get("content", {}).get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = document["components"]["schemas"].get(name, schema)
    return found


def _fields(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    required = schema.get("required", ())
    for name, facts in schema.get("properties", {}).items():
        if "description" in facts:  # what is refused whatever it holds is not offered
            yield name, ("Required. " if name in required else "") + facts["description"]


def _table(left: str, right: str, rows: Iterator[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{_inline(text)}</td></tr>" for name, text in rows
    )
    return f"<table><tr><th>{left}</th><th>{right}</th></tr>{body}</table>\n"


def _json(value: Any) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>\n"


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(part)}</p>\n" for part in text.strip().split("\n\n") if part)


def _inline(text: str) -> str:
    """Backticks become code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _anchor(method: str, path: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{method}{path}".lower()).strip("-")
