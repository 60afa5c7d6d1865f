"""A real Chromium on the web page of a real endpoint, and what went on there: messages, requests, addresses."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, Request, sync_playwright

from fmray.config.serving import ServeConfig
from fmray.serving.opening import Endpoint
from tests.endpoint import serving

PATIENCE = 60_000
"""Milliseconds that anything may take: the tests' machine may be busy."""
needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="needs chromium (Debian: apt install chromium)"
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's browser, without a window."""
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # it refuses to sandbox root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)
        yield browser
        browser.close()


@contextmanager
def open_endpoint(config: ServeConfig) -> Iterator[tuple[str, Endpoint]]:
    """An endpoint with its models behind a real server."""
    endpoint = Endpoint(config)
    with serving(endpoint.app) as url:
        yield url, endpoint


@contextmanager
def behind_prefixes(apps: dict[str, FastAPI]) -> Iterator[str]:
    """Several apps of one host, each below a path of its own, as Ray Serve does it."""
    host = FastAPI()
    for prefix, app in apps.items():
        host.mount(prefix, app)
    with serving(host) as url:
        yield url


@dataclass
class Visit:
    """A tab on the page, and what it asked and said."""

    page: Page
    url: str
    requests: list[Request] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.messages.append(f"pageerror: {error}"))
        self.page.on("console", lambda line: self.messages.append(f"{line.type}: {line.text}"))

    def open(self) -> Visit:
        """To where the models are known, or the key is asked for."""
        self.page.goto(self.url)
        self.page.wait_for_selector("#work:not([hidden]), #key-form:not([hidden]), #trouble:not(:empty)")
        return self

    def add(self, *files: Path) -> Visit:
        """Pictures through the file picker's input."""
        before = self.page.locator("#thumbs li").count()
        self.page.set_input_files("#files", [str(file) for file in files])
        self.until("n => document.querySelectorAll('#thumbs li').length === n", before + len(files))
        return self

    def until(self, condition: str, argument: object = None) -> None:
        """Until JavaScript says yes. `wait_for_function` would do that in the page, whose policy forbids `eval`."""
        end = time.monotonic() + PATIENCE / 1000
        while not self.page.evaluate(condition, argument):
            assert time.monotonic() < end, condition
            self.page.wait_for_timeout(50)

    def tab(self, name: str) -> Visit:
        self.page.click(f"#tab-{name}")
        return self

    def ask(self, question: str) -> str:
        """The whole answer."""
        count = self.page.locator(".said").count()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        self.until(
            "n => document.querySelectorAll('.said:not(.going)').length > n "
            "|| document.querySelector('#panel-ask .error').textContent",
            count,
        )
        assert not self.error("ask"), self.error("ask")
        return self.page.locator(".said p:first-child").last.text_content() or ""

    def error(self, panel: str) -> str:
        return self.page.locator(f"#panel-{panel} .error").text_content() or ""

    def wait_for_error(self, panel: str) -> str:
        self.page.wait_for_selector(f"#panel-{panel} .error:not(:empty)")
        return self.error(panel)

    def sent(self, route: str) -> list[dict[str, Any]]:
        """The bodies that went to a route."""
        asked = [request for request in self.requests if request.url.endswith(f"/v1/{route}")]
        return [json.loads(cast(str, request.post_data)) for request in asked]

    def check(self, *expected: str) -> None:
        """No message but the expected ones, and nothing was asked of another host."""
        told = [message for message in self.messages if not any(part in message for part in expected)]
        assert not told, told
        host = urlsplit(self.url).netloc
        elsewhere = [
            request.url
            for request in self.requests
            if not request.url.startswith(("blob:", "data:")) and urlsplit(request.url).netloc != host
        ]
        assert not elsewhere, elsewhere


@contextmanager
def visiting(browser: Browser, url: str, *expected: str, **options: Any) -> Iterator[Visit]:
    """A fresh tab; at its end nothing unexpected may be on its console. `expected`: parts of messages that may."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    visit = Visit(context.new_page(), url)
    yield visit
    context.close()
    visit.check(*expected)


def give_key(visit: Visit, key: str, *, keep: bool = False) -> None:
    """Type it in and send it off."""
    visit.page.fill("#key", key)
    visit.page.set_checked("#key-keep", keep)
    visit.page.press("#key", "Enter")


def axe_violations(page: Page) -> list[str]:
    """What axe-core finds wrong by WCAG 2.2 A and AA, and its best practices."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [f"{one['id']}: {one['help']}: {[node['html'] for node in one['nodes']]}" for one in found]
