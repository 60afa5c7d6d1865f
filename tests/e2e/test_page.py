"""The web page as people use it: a real Chromium, a real server, tiny models of all three kinds, an index of pictures."""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser

from fmray.config.base import RuntimeConfig
from fmray.config.serving import ServeConfig
from fmray.models.decoding.running import Running
from fmray.pipeline.index import build_index
from fmray.serving.opening import Endpoint
from tests.browser import Visit, chromium, needs_chromium, open_endpoint, visiting
from tests.endpoint import picture, save_answering, save_tiny_checkpoint
from tests.tiny_mllm import tiny_mllm
from tests.tiny_vqa import tiny_vqa
from tests.unit.serving.index_folders import index_config, write_pictures

pytestmark = [pytest.mark.slow, pytest.mark.browser, needs_chromium]
CLIP, MLLM, VQA = "fmray-clip", "talker", "answerer"
INDEXED = 12


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    """A checkpoint of each kind, and an index."""
    folder = tmp_path_factory.mktemp("served")
    clip = save_tiny_checkpoint(folder / "clip")
    mllm = save_answering(tiny_mllm(seed=4, max_answer_tokens=12), folder / "mllm")
    vqa = save_answering(tiny_vqa(seed=2), folder / "vqa")
    build_index(index_config(clip, write_pictures(folder / "pictures"), folder / "index"))
    return ServeConfig(
        checkpoint=clip,
        more={MLLM: mllm, VQA: vqa},
        indexes={"colors": str(folder / "index")},
        runtime=RuntimeConfig(threads=1),
    )


@pytest.fixture(scope="module")
def served(saved: ServeConfig) -> Iterator[tuple[str, Endpoint]]:
    with open_endpoint(saved) as running:
        yield running


@pytest.fixture
def visit(browser: Browser, served: tuple[str, Endpoint]) -> Iterator[Visit]:
    with visiting(browser, served[0]) as visit:
        yield visit.open()


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("red") / "red.png"
    file.write_bytes(picture("red"))
    return file


@pytest.fixture(scope="module")
def blue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("blue") / "blue.png"
    file.write_bytes(picture("blue"))
    return file


def answer_of(url: str, body: dict[str, Any]) -> str:
    """What the API says to the same messages at once."""
    whole = {name: value for name, value in body.items() if not name.startswith("stream")}
    reply = httpx.post(f"{url}/v1/chat/completions", json=whole, timeout=60).raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"])


# ------------------------------------------------------------------------------------------------------------ ask


def test_a_conversation_brings_each_picture_once_and_its_turns_with_it(
    visit: Visit, red: Path, blue: Path
) -> None:
    visit.add(red)
    first = visit.ask("what color is it?")
    visit.add(blue)
    second = visit.ask("is it big?")
    one, two = visit.sent("chat/completions")
    assert (one["model"], one["stream"]) == (MLLM, True)
    assert first == answer_of(visit.url, one)
    assert second == answer_of(visit.url, two)
    assert [message["role"] for message in two["messages"]] == ["user", "assistant", "user"]
    assert two["messages"][:2] == [*one["messages"], {"role": "assistant", "content": first}]
    [brought, text] = two["messages"][2]["content"]
    assert base64.b64decode(brought["image_url"]["url"].partition(",")[2]) == blue.read_bytes()
    assert text == {"type": "text", "text": "is it big?"}
    for size in ({"width": 1200, "height": 420}, {"width": 320, "height": 500}):
        visit.page.set_viewport_size(size)  # type: ignore[arg-type]
        visit.ask("is it big?")
        box = visit.page.locator("#panel-ask .main").bounding_box()
        assert box is not None
        assert 0 < box["y"] < size["height"] - box["height"], (
            "the next question can be asked without scrolling"
        )
    visit.page.click("#start-over")
    assert visit.page.locator(".said").count() == 0
    visit.ask("what shape is this?")
    [message] = visit.sent("chat/completions")[-1]["messages"]
    assert len(message["content"]) == 3, "both pictures again, and the question"


def test_a_vqa_model_is_asked_about_the_chosen_picture_alone(visit: Visit, red: Path, blue: Path) -> None:
    visit.page.select_option("#panel-ask-model", label=VQA)
    visit.page.fill("#question", "what color is the circle ?")
    visit.page.press("#question", "Enter")
    assert visit.wait_for_error("ask").startswith("Choose a picture first")
    visit.add(red, blue)
    visit.page.click("#picture-0")
    assert visit.page.locator("#preview").get_attribute("alt") == "red.png"
    for question in ("what color is the circle ?", "is there a square ?"):
        said = visit.ask(question)
        body = visit.sent("chat/completions")[-1]
        assert said == (answer_of(visit.url, body) or "(an empty answer)")
        [message] = body["messages"]
        assert (
            base64.b64decode(message["content"][0]["image_url"]["url"].partition(",")[2]) == red.read_bytes()
        )
        assert message["content"][1]["text"] == question


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes its time for every token."""
    step = Running.step

    def slow(self: Running) -> Any:
        time.sleep(0.4)
        return step(self)

    monkeypatch.setattr(Running, "step", slow)


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("way", ["button", "key"])
def test_an_answer_comes_by_tokens_and_can_be_stopped(
    visit: Visit, served: tuple[str, Endpoint], way: str
) -> None:
    page = visit.page
    page.fill("#question", "is it big?")
    page.press("#question", "Enter")
    visit.until("document.querySelector('.said p').textContent.length > 0")
    early = page.locator(".said p").first.text_content() or ""
    visit.until("n => document.querySelector('.said p').textContent.length > n", len(early))
    later = page.locator(".said p").first.text_content() or ""
    assert later.startswith(early)
    assert page.get_attribute("#panel-ask", "aria-busy") == "true"
    if way == "button":
        page.click("#panel-ask .stop")
    else:
        page.press("#question", "Escape")
    page.wait_for_selector(".said:not(.going)")
    assert page.locator("#panel-ask .status").text_content() == "Stopped."
    assert page.locator("#panel-ask .stop").is_hidden()
    assert page.evaluate("document.activeElement.id") == "question"
    kept = page.locator(".said p").first.text_content() or ""
    [body] = visit.sent("chat/completions")
    whole = answer_of(visit.url, body)
    assert whole.startswith(kept)
    assert len(kept) < len(whole)
    visit.ask("sure?")
    assert visit.sent("chat/completions")[-1]["messages"][1] == {"role": "assistant", "content": kept}


def test_what_is_said_reaches_a_screen_reader(visit: Visit) -> None:
    said = visit.ask("what color is it?")
    visit.until("document.getElementById('announcer').textContent !== ''")
    told = visit.page.locator("#announcer").text_content() or ""
    assert told in said or told == "The answer is empty"
    assert visit.page.get_attribute("#announcer", "role") == "status"
    assert visit.page.get_attribute(".talk", "aria-live") == "off", "or every token would be read out"


def test_options_go_along(visit: Visit) -> None:
    visit.page.click("#panel-ask .options summary")
    visit.page.fill("#longest", "2")
    visit.page.fill("#temperature", "0.5")
    visit.ask("what color is it?")
    [body] = visit.sent("chat/completions")
    assert (body["max_completion_tokens"], body["temperature"]) == (2, 0.5)
    assert re.match(
        r"2 tokens · [\d.]+ s · cut at the longest", visit.page.locator(".said .quiet").text_content() or ""
    )


# ------------------------------------------------------------------------------------------- classify and search


def test_labels_become_bars(visit: Visit, red: Path, blue: Path) -> None:
    visit.add(red, blue).tab("classify")
    visit.page.fill("#labels", "red, blue\n a big circle ,red")
    visit.page.click("#panel-classify .main")
    visit.page.wait_for_selector(".result")
    [body] = visit.sent("classify")
    assert body["labels"] == ["red", "blue", "a big circle"]
    reply = httpx.post(f"{visit.url}/v1/classify", json=body, timeout=60).json()
    shown = visit.page.locator(".result")
    assert shown.count() == 2
    for place, found in enumerate(reply["data"]):
        card = shown.nth(place)
        assert card.locator("h3").text_content() == ("red.png", "blue.png")[place]
        assert card.locator("li > span:first-child").all_text_contents() == [
            one["label"] for one in found["probs"]
        ]
        for bar, one in zip(card.locator(".bar span").all(), found["probs"], strict=True):
            assert float((bar.get_attribute("data-share") or "").removesuffix("%")) == pytest.approx(
                100 * one["score"]
            )
        shares = [float(text.removesuffix(" %")) for text in card.locator(".share").all_text_contents()]
        assert sum(shares) == pytest.approx(100, abs=2)
    visit.until("document.getElementById('announcer').textContent.startsWith('red.png: ')")
    visit.until("document.querySelector('.bar span').getBoundingClientRect().width > 20")


def test_the_index_is_searched_by_words_and_by_picture(visit: Visit, red: Path) -> None:
    visit.tab("search")
    assert visit.page.locator("#by-picture").is_disabled()
    visit.page.fill("#query", "a red heart")
    visit.page.press("#query", "Enter")
    visit.page.wait_for_selector(".hits li")
    assert visit.page.locator(".hits img").count() == INDEXED
    assert visit.page.locator(".hits img").first.evaluate("image => image.naturalWidth") > 0
    visit.add(red)
    visit.page.click("#panel-search .options summary")
    visit.page.fill("#how-many", "3")
    visit.page.fill("#prefix", "blue/")
    visit.page.click("#by-picture")
    visit.until("document.querySelectorAll('.hits li').length === 2")
    words, mine = visit.sent("search")
    assert words["query"] == "a red heart"
    assert (mine["top_k"], mine["filter"], mine["index"]) == (3, {"prefix": "blue/"}, "colors")
    assert mine["query"]["image"].startswith("data:image/png;base64,")
    named = [image.get_attribute("alt") or "" for image in visit.page.locator(".hits img").all()]
    reply = httpx.post(f"{visit.url}/v1/search", json=mine, timeout=60).json()
    assert named == [hit.get("caption") or hit["id"] for hit in reply["data"]]


# --------------------------------------------------------------------------------------------------------- pictures


def sent_picture(visit: Visit) -> tuple[bytes, str]:
    """What one classification sends of the only picture."""
    visit.tab("classify").page.fill("#labels", "red, blue")
    visit.page.click("#panel-classify .main")
    visit.page.wait_for_selector(".result")
    [url] = visit.sent("classify")[-1]["input"]
    head, _, data = url.partition(",")
    return base64.b64decode(data), head


def test_a_small_picture_is_sent_as_it_is(visit: Visit, red: Path) -> None:
    assert sent_picture(visit.add(red)) == (red.read_bytes(), "data:image/png;base64")


def test_a_large_one_is_made_small_and_turned_the_right_way(visit: Visit, tmp_path: Path) -> None:
    wide = Image.new("RGB", (3000, 2000), "white")
    wide.paste("red", (0, 0, 1500, 2000))  # left, which orientation 6 turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "photo.jpg", exif=exif)
    data, head = sent_picture(visit.add(tmp_path / "photo.jpg"))
    sent = Image.open(io.BytesIO(data))
    assert (head, sent.format, sent.size) == ("data:image/jpeg;base64", "JPEG", (683, 1024))
    assert sent.getexif().get(0x0112, 1) == 1
    top, bottom = (sent.convert("RGB").getpixel((340, y)) for y in (100, 900))
    assert top[0] > 200 > 60 > top[1]
    assert min(bottom) > 200


def test_a_large_transparent_one_stays_transparent(visit: Visit, tmp_path: Path) -> None:
    Image.new("RGBA", (2048, 512), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    data, head = sent_picture(visit.add(tmp_path / "clear.png"))
    sent = Image.open(io.BytesIO(data))
    assert (head, sent.size, sent.mode) == ("data:image/png;base64", (1024, 256), "RGBA")


HANDED = """
([how, data]) => {
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], `${how}.png`, {type: "image/png"}));
    const target = document.getElementById("question");
    const options = {bubbles: true, cancelable: true, clipboardData: transfer, dataTransfer: transfer};
    if (how === "paste") return target.dispatchEvent(new ClipboardEvent("paste", options));
    target.dispatchEvent(new DragEvent("dragenter", options));
    const marked = document.getElementById("well").classList.contains("over");
    return marked && !target.dispatchEvent(new DragEvent("drop", options));
}
"""


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_pictures_can_be_pasted_and_dropped(visit: Visit, how: str) -> None:
    assert visit.page.evaluate(HANDED, [how, base64.b64encode(picture("green")).decode()])
    visit.page.wait_for_selector("#thumbs li")
    assert visit.page.locator("#about-picture").text_content() == f"{how}.png, 20 × 24 pixels"
    assert visit.page.locator("#well.over").count() == 0


def test_what_is_no_picture_is_named_and_the_others_are_there(
    visit: Visit, red: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    visit.page.set_input_files("#files", [str(tmp_path / "notes.png"), str(red)])
    visit.page.wait_for_selector("#trouble:not(:empty)")
    assert (
        visit.page.locator("#trouble").text_content()
        == "notes.png is not a picture that this browser can read."
    )
    assert visit.page.locator("#thumbs li").count() == 1
    visit.page.click("#thumbs button")
    assert visit.page.locator("#preview").is_hidden()
    assert visit.page.evaluate("document.activeElement.id") == "files"
