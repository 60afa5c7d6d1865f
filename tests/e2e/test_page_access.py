"""The web page where something is in the way: keys, limits, errors; and models in several places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Route

from fmray.config.base import RuntimeConfig
from fmray.config.serving import AccessConfig, ServeConfig
from fmray.serving.keys import KeyFile
from fmray.serving.opening import Endpoint
from tests.browser import (
    behind_prefixes,
    chromium,
    give_key,
    needs_chromium,
    open_endpoint,
    visiting,
)
from tests.endpoint import picture, save_answering, save_tiny_checkpoint
from tests.tiny_mllm import tiny_mllm
from tests.tiny_vqa import tiny_vqa

pytestmark = [pytest.mark.slow, pytest.mark.browser, needs_chromium]
MLLM = "talker"
REFUSED = "Failed to load resource"
"""What Chromium says on its console of every answer of 400 and more."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `clip`, `mllm` and `vqa`."""
    folder = tmp_path_factory.mktemp("served")
    save_tiny_checkpoint(folder / "clip")
    save_answering(tiny_mllm(seed=4), folder / "mllm")
    save_answering(tiny_vqa(seed=2), folder / "vqa")
    return folder


def config_of(folder: Path, **changes: Any) -> ServeConfig:
    threads = RuntimeConfig(threads=1)
    return ServeConfig(**{"checkpoint": str(folder / "clip"), "runtime": threads, **changes})


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with open_endpoint(config_of(folder, more={MLLM: str(folder / "mllm")}, max_labels=4)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def keyed(folder: Path) -> Iterator[tuple[str, str]]:
    """An endpoint that needs a key, and one that it takes."""
    file = folder / "keys.yaml"
    key = KeyFile(file).add("reader")
    with open_endpoint(config_of(folder, access=AccessConfig(key_file=str(file)))) as (url, _):
        yield url, key


@pytest.fixture
def red(tmp_path: Path) -> Path:
    file = tmp_path / "red.png"
    file.write_bytes(picture("red"))
    return file


# ------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_asked_for_and_sent(browser: Browser, keyed: tuple[str, str]) -> None:
    url, key = keyed
    with visiting(browser, url, REFUSED) as visit:
        visit.open()
        assert visit.page.evaluate("document.activeElement.id") == "key"
        assert visit.page.locator("#work").is_hidden()
        assert not [request for request in visit.requests if "/v1/" in request.url], "it knows before it asks"
        give_key(visit, "fmray-wrong")
        visit.until("() => document.getElementById('key-why').textContent.includes('not known')")
        assert "(Request req_" in (visit.page.locator("#key-why").text_content() or "")
        give_key(visit, key)
        visit.page.wait_for_selector("#work:not([hidden])")
        assert visit.page.locator("#key-form").is_hidden()
        assert visit.requests[-1].headers["authorization"] == f"Bearer {key}"
        assert (
            visit.page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0
        )
        visit.page.click("#tab-classify")
        visit.page.click("#panel-classify .code summary")
        code = visit.page.locator("#panel-classify pre").text_content() or ""
        assert "$FMRAY_KEY" in code
        assert key not in visit.page.content(), "a key is not shown, in no snippet either"
        visit.open()
        assert visit.page.locator("#key-form").is_visible(), "a reload forgets it"


def test_a_key_is_kept_where_that_is_wanted_and_forgotten_again(
    browser: Browser, keyed: tuple[str, str]
) -> None:
    url, key = keyed
    with visiting(browser, url) as visit:
        give_key(visit.open(), key, keep=True)
        visit.page.wait_for_selector("#work:not([hidden])")
        visit.open()
        assert visit.page.locator("#work").is_visible()
        visit.page.click("#key-button")
        visit.page.click("#key-forget")
        assert visit.page.locator("#work").is_hidden()
        assert visit.page.evaluate("sessionStorage.length") == 0
        visit.open()
        assert visit.page.locator("#key-form").is_visible()


def test_a_key_that_ends_while_the_page_is_open_is_asked_for_again(
    browser: Browser, keyed: tuple[str, str]
) -> None:
    url, key = keyed
    with visiting(browser, url, REFUSED) as visit:
        give_key(visit.open(), key)
        visit.page.wait_for_selector("#work:not([hidden])")
        visit.page.set_extra_http_headers(
            {"authorization": "Bearer fmray-ended"}
        )  # as if it were another one now
        visit.page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": picture()})
        visit.page.wait_for_selector("#thumbs li")
        visit.page.fill("#labels", "red")
        visit.page.click("#panel-classify .main")
        visit.page.wait_for_selector("#key-form:not([hidden])")
        assert visit.page.locator("#thumbs li").count() == 1, "nothing is lost"


# ---------------------------------------------------------------------------------------------------- limits, errors


def test_a_busy_endpoint_is_waited_for_and_the_wait_can_be_stopped(
    browser: Browser, folder: Path, red: Path
) -> None:
    config = config_of(folder, access=AccessConfig(inputs_per_minute=1))
    with open_endpoint(config) as (url, _), visiting(browser, url, REFUSED) as visit:
        visit.open().add(red)
        visit.page.fill("#labels", "red, blue")
        visit.page.click("#panel-classify .main")
        visit.page.wait_for_selector(".result")
        visit.page.click("#panel-classify .main")
        visit.page.wait_for_selector("#panel-classify .status:not(:empty)")
        status = visit.page.locator("#panel-classify .status")
        first = status.text_content() or ""
        assert first.startswith("The endpoint is busy. Trying again in ")
        visit.until("first => document.querySelector('#panel-classify .status').textContent !== first", first)
        assert (status.text_content() or "").startswith("The endpoint is busy. Trying again in ")
        visit.page.click("#panel-classify .stop")
        visit.until("() => document.querySelector('#panel-classify .status').textContent === 'Stopped.'")
        assert len(visit.sent("classify")) == 2


def test_after_the_wait_the_same_is_asked_again(browser: Browser, url: str, red: Path) -> None:
    """The first answer is one of a full queue; the second the real endpoint's."""
    asked = 0

    def full_once(route: Route) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            return route.continue_()
        return route.fulfill(
            status=429, headers={"retry-after": "1"}, json={"error": {"message": "the queue is full"}}
        )

    with visiting(browser, url, REFUSED) as visit:
        visit.page.route("**/v1/classify", full_once)
        visit.open().add(red).tab("classify")
        visit.page.fill("#labels", "red, blue")
        visit.page.click("#panel-classify .main")
        visit.page.wait_for_selector(".result")
        one, two = visit.sent("classify")
        assert one == two
        assert visit.page.locator("#panel-classify .status").text_content() == ""


def test_an_error_is_one_sentence_with_the_requests_id(browser: Browser, url: str, red: Path) -> None:
    with visiting(browser, url, REFUSED) as visit:
        visit.open().add(red).tab("classify")
        visit.page.fill("#labels", "a, b, c, d, e")
        visit.page.click("#panel-classify .main")
        told = visit.wait_for_error("classify")
        reply = httpx.post(f"{url}/v1/classify", json=visit.sent("classify")[0], timeout=60)
        assert told.lower().startswith(reply.json()["error"]["message"].lower())
        assert told.rstrip(")").rpartition(" ")[2].startswith("req_")
        assert visit.page.get_attribute("#panel-classify .error", "role") == "alert"
        visit.page.fill("#labels", "a, b")
        visit.page.click("#panel-classify .main")
        visit.page.wait_for_selector(".result")
        assert visit.error("classify") == ""


def test_an_endpoint_that_is_gone_and_an_answer_that_breaks_off(browser: Browser, url: str) -> None:
    half = 'data: {"choices": [{"delta": {"content": "it is"}}]}\n\n'
    wrong = 'data: {"error": {"message": "the model has failed"}}\n\n'
    with visiting(browser, url, REFUSED, "ERR_") as visit:
        visit.open()
        bodies = iter((half, half + wrong))

        def breaking(route: Route) -> None:
            route.fulfill(body=next(bodies), content_type="text/event-stream")

        visit.page.route("**/v1/chat/completions", breaking)
        for sentence in ("The answer broke off.", "The model has failed."):
            visit.page.fill("#question", "what is it?")
            visit.page.press("#question", "Enter")
            assert visit.wait_for_error("ask") == sentence
            assert visit.page.locator(".said p:first-child").last.text_content() == "it is", (
                "what came is kept"
            )
            visit.page.click("#start-over")
        visit.page.unroute("**/v1/chat/completions")
        visit.page.context.set_offline(True)
        visit.page.fill("#question", "what is it?")
        visit.page.press("#question", "Enter")
        visit.until(
            "() => document.querySelector('#panel-ask .error').textContent.startsWith('The endpoint cannot')"
        )
        assert visit.page.input_value("#question") == "what is it?", "nothing has to be typed again"
        assert visit.page.locator(".said").count() == 0


# ------------------------------------------------------------------------------------------------- where models are


def test_what_no_model_can_do_is_not_offered(browser: Browser, keyed: tuple[str, str], folder: Path) -> None:
    with (
        open_endpoint(config_of(folder, checkpoint=str(folder / "vqa"))) as (url, _),
        visiting(browser, url) as visit,
    ):
        visit.open()
        shown = visit.page.locator("[role=tab]:visible").all_text_contents()
        assert shown == ["Ask"]
        assert (
            visit.page.locator("#served").text_content(),
            visit.page.locator(".model select").count(),
        ) == (
            "serves fmray-vqa",
            0,
        )
    with visiting(browser, keyed[0]) as visit:
        give_key(visit.open(), keyed[1])
        visit.page.wait_for_selector("#work:not([hidden])")
        assert visit.page.locator("[role=tab]:visible").all_text_contents() == ["Classify"]


def test_models_below_several_prefixes_are_one_page(browser: Browser, folder: Path, red: Path) -> None:
    clip = Endpoint(config_of(folder, page_bases=("/clip", "/vqa")))
    vqa = Endpoint(config_of(folder, checkpoint=str(folder / "vqa")))
    with (
        behind_prefixes({"/clip": clip.app, "/vqa": vqa.app}) as url,
        visiting(browser, f"{url}/clip/") as visit,
    ):
        visit.open().add(red)
        assert visit.page.locator("#served").text_content() == "serves 2 models"
        visit.ask("what color is the circle ?")
        visit.tab("classify").page.fill("#labels", "red, blue")
        visit.page.click("#panel-classify .main")
        visit.page.wait_for_selector(".result")
        asked = {request.url.removeprefix(url) for request in visit.requests if request.method == "POST"}
        assert asked == {"/vqa/v1/chat/completions", "/clip/v1/classify"}
        lists = [request.url for request in visit.requests if request.url.endswith("/v1/models")]
        assert sorted(lists) == [f"{url}/clip/v1/models", f"{url}/vqa/v1/models"], (
            "this endpoint is asked once"
        )
    clip.shelf.close()
    vqa.shelf.close()
