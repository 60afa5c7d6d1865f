"""The web page at `/`: a handful of files, sent as they are, that may load nothing from anywhere else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter, Request, Response

from fmray.config.serving import ServeConfig
from fmray.errors import RequestError
from fmray.serving.schemas import Body

HTML, CSS, SCRIPT = "text/html; charset=utf-8", "text/css; charset=utf-8", "text/javascript; charset=utf-8"
INDEX = "index.html"
FILES = {
    INDEX: HTML,
    "page.css": CSS,
    "icon.svg": "image/svg+xml",
    **{
        f"{name}.js": SCRIPT
        for name in ("page", "api", "panel", "ask", "classify", "search", "pictures", "snippets")
    },
}
"""All that is sent, and as what."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""No inline script or style, no other origin, no frame around the page; `data:` and `blob:` are the reader's own pictures."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
"""`no-cache`: kept, but asked about every time, as the names stay the same when the files change."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page. `PageFile(b"<!doctype html>…", "text/html; charset=utf-8", '"5f70bf18a0860070"')`"""

    content: bytes
    media_type: str
    etag: str


class EndpointFacts(Body):
    """What the page has to know before its first request. `EndpointFacts(bases=["", "/vqa"], key=True)`"""

    bases: list[str]
    """Where it looks for models: this endpoint, then others of the same host."""
    key: bool
    """Whether requests need a key."""


class PageRoutes:
    """`/`, `/page/{file}` and `/page/endpoint.json`; nothing where the configuration says `page: false`."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._files = (
            {name: _read(name, media_type) for name, media_type in FILES.items()} if config.page else {}
        )

    def add_to(self, router: APIRouter) -> None:
        """These routes; not in the API's document, as they are none of it."""
        if not self._config.page:
            return
        router.get("/", include_in_schema=False)(self.index)
        router.get("/page/endpoint.json", include_in_schema=False)(self.endpoint)
        router.get("/page/{file}", include_in_schema=False)(self.file)

    async def index(self, request: Request) -> Response:
        """The page."""
        return self._send(INDEX, request)

    async def file(self, file: str, request: Request) -> Response:
        """One of its files; raises RequestError(404) for every other name."""
        return self._send(file, request)

    async def endpoint(self) -> EndpointFacts:
        """Where models are, and whether a key is needed."""
        return EndpointFacts(
            bases=["", *self._config.page_bases], key=self._config.access.key_file is not None
        )

    def _send(self, name: str, request: Request) -> Response:
        if name not in self._files:
            raise RequestError(404, "not_found", "no such route")
        file = self._files[name]
        headers = {**HEADERS, "etag": file.etag}
        known = [
            tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")
        ]
        if file.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)


def _read(name: str, media_type: str) -> PageFile:
    """From the installed package."""
    content = (resources.files("fmray.serving") / "page" / name).read_bytes()
    return PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:16]}"')
