"""The web page for everybody: small and dark screens, keyboards, screen readers; and for those who go on with its snippets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser

from fmray.config.base import RuntimeConfig
from fmray.config.serving import AccessConfig, ServeConfig
from fmray.serving.keys import KeyFile
from tests.browser import Visit, axe_violations, chromium, give_key, needs_chromium, open_endpoint, visiting
from tests.endpoint import picture, save_answering, save_tiny_checkpoint
from tests.tiny_mllm import tiny_mllm

pytestmark = [pytest.mark.slow, pytest.mark.browser, needs_chromium]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    folder = tmp_path_factory.mktemp("served")
    talker = save_answering(tiny_mllm(seed=4), folder / "mllm")
    clip = save_tiny_checkpoint(folder / "clip")
    return ServeConfig(checkpoint=clip, more={"talker": talker}, runtime=RuntimeConfig(threads=1))


@pytest.fixture(scope="module")
def url(config: ServeConfig) -> Iterator[str]:
    with open_endpoint(config) as (url, _):
        yield url


@pytest.fixture
def red(tmp_path: Path) -> Path:
    file = tmp_path / "red.png"
    file.write_bytes(picture("red"))
    return file


# ------------------------------------------------------------------------------------------------------ its snippets

ODD = 'it\'s $HOME `x` "y" \\n é ❤'


def run(code: str, way: str, folder: Path, **environment: str) -> str:
    command = ["bash", "-c", code] if way == "curl" else [sys.executable, "-c", code]
    settings = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "LC_ALL": "C.UTF-8", **environment}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("way", ["curl", "Python"])
def test_the_requests_as_code_do_what_the_page_did(
    browser: Browser, url: str, tmp_path: Path, way: str
) -> None:
    file = tmp_path / "it's a $pic.png"
    file.write_bytes(picture("red"))
    with visiting(browser, url, permissions=["clipboard-read", "clipboard-write"]) as visit:
        visit.open().add(file)
        visit.page.fill("#question", ODD)
        visit.page.click("#panel-ask .code summary")
        visit.page.click(f"#panel-ask .code button >> text={way}")
        code = visit.page.locator("#panel-ask pre").text_content() or ""
        said = visit.ask(ODD)
        told = run(code, way, tmp_path)
        assert (said == told.rstrip("\n")) if way == "Python" else ("[DONE]" in told)
        visit.tab("classify").page.fill("#labels", f"{ODD}, blue")
        visit.page.click("#panel-classify .code summary")
        visit.page.click(f"#panel-classify .code button >> text={way}")
        visit.page.click("#panel-classify .code button >> text=Copy")
        visit.page.click("#panel-classify .main")
        visit.page.wait_for_selector(".result")
        copied = visit.page.evaluate("navigator.clipboard.readText()")
        told = run(copied, way, tmp_path)
        best = visit.page.locator(".bars li:first-child > span:first-child").text_content() or ""
        reply = httpx.post(f"{url}/v1/classify", json=visit.sent("classify")[0], timeout=60).json()
        assert reply["data"][0]["label"] == best
        assert str(reply["data"][0]["probs"][0]["score"]) in told


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_snippets_take_the_key_from_the_environment(
    browser: Browser, config: ServeConfig, tmp_path: Path, red: Path
) -> None:
    key = KeyFile(tmp_path / "keys.yaml").add("reader")
    keyed = config.replace(more={}, access=AccessConfig(key_file=str(tmp_path / "keys.yaml")))
    with open_endpoint(keyed) as (url, _), visiting(browser, url) as visit:
        give_key(visit.open(), key)
        visit.page.wait_for_selector("#work:not([hidden])")
        visit.add(red).page.fill("#labels", "red")
        visit.page.click("#panel-classify .code summary")
        for way in ("curl", "Python"):
            visit.page.click(f"#panel-classify .code button >> text={way}")
            code = visit.page.locator("#panel-classify pre").text_content() or ""
            assert "probs" in run(code, way, tmp_path, FMRAY_KEY=key)


# -------------------------------------------------------------------------------------------------- for everybody


def fill_everything(visit: Visit, red: Path) -> None:
    visit.open().add(red)
    visit.ask("what color is it?")
    visit.tab("classify").page.fill("#labels", "red, blue")
    visit.page.click("#panel-classify .main")
    visit.page.wait_for_selector(".result")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_axe_finds_nothing(browser: Browser, url: str, red: Path, scheme: str, width: int) -> None:
    options: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    with visiting(browser, url, reduced_motion="reduce", **options) as visit:
        fill_everything(visit, red)
        for name in ("classify", "ask"):
            visit.tab(name)
            for summary in visit.page.locator(f"#panel-{name} summary").all():
                summary.click()
            assert axe_violations(visit.page) == []
            assert visit.page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
        visit.page.evaluate("document.getElementById('key-form').hidden = false")
        assert axe_violations(visit.page) == []
        dark = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(23, 23, 21)") == (scheme == "dark")


def test_reduced_motion_is_respected(browser: Browser, url: str, red: Path) -> None:
    for motion, moves in (("reduce", False), ("no-preference", True)):
        with visiting(browser, url, reduced_motion=motion) as visit:
            fill_everything(visit, red)
            seconds = "getComputedStyle(document.querySelector('.bar span')).transitionDuration"
            assert (visit.page.evaluate(seconds) != "0s") is moves


def focused(visit: Visit) -> str:
    return str(visit.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))


def tab_to(visit: Visit, target: str, key: str = "Tab") -> None:
    for _ in range(30):
        visit.page.keyboard.press(key)
        if focused(visit) == target:
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            hidden_input = target == "files" or target.startswith("picture-")
            assert hidden_input or visit.page.evaluate(outline) != "none", f"{target} shows no focus"
            return
    raise AssertionError(f"{target} cannot be reached; the last one was {focused(visit)}")


def test_a_keyboard_is_enough(browser: Browser, url: str, red: Path, tmp_path: Path) -> None:
    (tmp_path / "blue.png").write_bytes(picture("blue"))
    with visiting(browser, url) as visit:
        page, press = visit.open().page, visit.page.keyboard.press
        press("Tab")
        assert focused(visit) == "Skip to the models"
        press("Enter")
        tab_to(visit, "files")
        with page.expect_file_chooser() as chooser:
            press(" ")
        chooser.value.set_files([str(red), str(tmp_path / "blue.png")])
        page.wait_for_selector("#thumbs li")
        tab_to(visit, "picture-1")
        press("ArrowLeft")
        assert (focused(visit), page.get_attribute("#preview", "alt")) == ("picture-0", "red.png")
        tab_to(visit, "tab-ask")
        press("ArrowRight")
        assert focused(visit) == "tab-classify"
        press("ArrowRight")
        assert focused(visit) == "tab-ask", "round and round; there is no index to search"
        press("End")
        tab_to(visit, "labels")
        page.keyboard.type("red, blue")
        tab_to(visit, "Classify")
        press("Enter")
        page.wait_for_selector(".result")
        assert page.locator(".result").count() == 2
        tab_to(visit, "tab-classify", "Shift+Tab")
        press("ArrowLeft")
        tab_to(visit, "question")
        page.keyboard.type("is it")
        press("Shift+Enter")
        page.keyboard.type("big?")
        press("Enter")
        page.wait_for_selector(".said:not(.going)")
        assert visit.sent("chat/completions")[0]["messages"][0]["content"][-1]["text"] == "is it\nbig?"
