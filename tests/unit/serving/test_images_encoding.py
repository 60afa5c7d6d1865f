"""Every spelling of a `data:` URL in serving.md 6.5: the bytes, or the documented answer."""

from __future__ import annotations

import base64
import time
import tracemalloc

import pytest
import torch

from fmray.config.schema import ImageConfig
from fmray.errors import RequestError
from fmray.serving.asks import ImageAsk, TextAsk, read_asks
from fmray.serving.images import image_bytes, is_data_url, pixels_of
from fmray.serving.schemas import ImageUrl, ImageUrlPart
from tests.endpoint import picture
from tests.hostile_pictures import encoded, known

# Two bytes behind the picture make its base64 end in one "=", and hold "+" and "/".
PNG = encoded(known()) + b"\xfb\xff\xbf" + b"\0" * ((1 - len(encoded(known()))) % 3 + 1)
BASE64 = base64.b64encode(PNG).decode()
HEAD = "data:image/png;base64,"
BAD = "input[7]: not valid base64"
EMPTY = "input[7]: the picture is empty"


def test_the_payload_shows_every_peculiarity() -> None:
    assert BASE64.endswith("=")
    assert {"+", "/"} <= set(BASE64)


ACCEPTED = {
    "plain": HEAD + BASE64,
    "a wrong type": f"data:image/jpeg;base64,{BASE64}",
    "a type that is none": f"data:image/x-wrong;base64,{BASE64}",
    "no type": f"data:;base64,{BASE64}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{BASE64}",
    "charset": f"data:image/png;charset=utf-8;base64,{BASE64}",
    "name": f"data:image/png;name=a.png;charset=x;base64,{BASE64}",
    "lines of 76, CRLF": HEAD + "\r\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
    "lines of 60, LF, one at the end": HEAD
    + "\n".join(BASE64[i : i + 60] for i in range(0, len(BASE64), 60))
    + "\n",
    "tabs and spaces": HEAD + "\t" + BASE64.replace("A", " A "),
    "URL-safe": HEAD + BASE64.replace("+", "-").replace("/", "_"),
    "URL-safe, unpadded": HEAD + BASE64.replace("+", "-").replace("/", "_").rstrip("="),
    "both alphabets": HEAD + BASE64.replace("+", "-"),
    "unpadded": HEAD + BASE64.rstrip("="),
    "too much padding": HEAD + BASE64 + "===",
    "percent-encoded base64": HEAD + BASE64.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    "percent-encoded, lower case": HEAD + BASE64.replace("+", "%2b").replace("/", "%2f").replace("=", "%3d"),
    "percent-encoded line breaks": HEAD
    + "%0D%0A".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_spellings_that_give_the_bytes(case: str) -> None:
    assert image_bytes(ACCEPTED[case], "input[0]", max_bytes=len(PNG)) == PNG


NOT_DATA = "input[7]: send the picture as data:image/png;base64,…; other URLs are not fetched"
NOT_BASE64 = "input[7]: the data: URL must be base64"
NOT_IMAGE = "input[7]: not an image; send JPEG, PNG, WebP, GIF or BMP"
OTHER = "input[7]: not JPEG, PNG, WebP, GIF or BMP"
REFUSED: dict[str, tuple[str, str, str]] = {
    "garbage behind": (HEAD + BASE64 + "!", "invalid_image", BAD),
    "letters behind the padding": (HEAD + BASE64 + "AAAA", "invalid_image", BAD),
    "padding within": (HEAD + BASE64[:8] + "=" + BASE64[8:], "invalid_image", BAD),
    "one letter": (HEAD + "A", "invalid_image", BAD),
    "a dollar": (HEAD + "ab$d", "invalid_image", BAD),
    "no ASCII": (HEAD + "äöü", "invalid_image", BAD),
    "a null byte": (HEAD + "AAAA\0", "invalid_image", BAD),
    "a percent sign": (HEAD + "AAA%", "invalid_image", BAD),
    "percent-encoded letters": (HEAD + "%41" * 8, "invalid_image", BAD),
    "empty": (HEAD, "invalid_image", EMPTY),
    "white space": (HEAD + " \r\n", "invalid_image", EMPTY),
    "padding alone": (HEAD + "====", "invalid_image", EMPTY),
    "no ;base64": ("data:image/png," + BASE64, "invalid_image", NOT_BASE64),
    "percent-encoded bytes": ("data:image/png,%89PNG%0D%0A%1A%0A", "invalid_image", NOT_BASE64),
    "base64 is not the last parameter": (f"data:image/png;base64;x=y,{BASE64}", "invalid_image", NOT_BASE64),
    "nothing but data": ("data:,", "invalid_image", NOT_BASE64),
    "a text": (f"data:text/plain;base64,{BASE64}", "unsupported_image_format", NOT_IMAGE),
    "a page": (f"data:text/html;base64,{BASE64}", "unsupported_image_format", NOT_IMAGE),
    "a film": (f"data:video/mp4;base64,{BASE64}", "unsupported_image_format", NOT_IMAGE),
    "svg": ("data:image/svg+xml;base64,PHN2Zy8+", "unsupported_image_format", OTHER),
    "svg that says png": (HEAD + "PHN2Zy8+", "unsupported_image_format", OTHER),
    "base64 without a URL": (BASE64, "url_not_allowed", NOT_DATA),
    "no comma": ("data:image/png;base64", "url_not_allowed", NOT_DATA),
    "no comma for long": ("data:image/png;" + "x" * 200 + ";base64," + BASE64, "url_not_allowed", NOT_DATA),
    "a space before": (" " + HEAD + BASE64, "url_not_allowed", NOT_DATA),
    "a file": ("file:///etc/passwd", "url_not_allowed", NOT_DATA),
    "a path": ("/etc/passwd", "url_not_allowed", NOT_DATA),
    "ftp": ("ftp://example.com/cat.png", "url_not_allowed", NOT_DATA),
    "a web address that nobody fetched": ("https://example.com/cat.png", "url_not_allowed", NOT_DATA),
    "nothing": ("", "url_not_allowed", NOT_DATA),
    "a byte too many": (
        HEAD + base64.b64encode(PNG + bytes(10)).decode(),
        "image_too_large",
        f"input[7]: the picture has more than {len(PNG) + 9} bytes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_spellings_that_are_refused(case: str) -> None:
    url, code, message = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        image_bytes(url, "input[7]", max_bytes=len(PNG) + 9)
    error = caught.value
    assert (error.status, error.code, error.message, error.param) == (400, code, message, "input[7]")


@pytest.mark.parametrize(
    "payload", ["%41" * 6_000_000, "%2B" * 6_000_000, "A" * 20_000_000, "\n" * 20_000_000]
)
def test_a_full_body_is_judged_in_bounded_time_and_memory(payload: str) -> None:
    url = HEAD + payload
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(RequestError):
        image_bytes(url, "input[7]", max_bytes=10 * 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(url)
    assert time.process_time() - start < 3


def test_a_plain_string_in_image_url_is_a_picture() -> None:
    """`{"image_url": "data:…"}` and `{"image_url": {"url": "data:…"}}`, beside a bare string and a text."""
    items = [
        ImageUrlPart.model_validate({"type": "image_url", "image_url": HEAD + BASE64}),
        ImageUrlPart(image_url=ImageUrl(url=HEAD + BASE64)),
        HEAD + BASE64,
        "data: the new oil",
    ]
    asks = read_asks(items, modality="auto", max_inputs=9, max_image_bytes=len(PNG))
    assert [ask.image for ask in asks if isinstance(ask, ImageAsk)] == [PNG] * 3
    assert isinstance(asks[3], TextAsk)


def test_what_was_fetched_is_read_by_its_name() -> None:
    url = "https://example.com/cat.png"
    assert image_bytes(url, "input[0]", max_bytes=9, fetched={"input[0]": PNG}) == PNG
    with pytest.raises(RequestError, match="other URLs are not fetched"):
        image_bytes(url, "input[1]", max_bytes=9, fetched={"input[0]": PNG})
    with pytest.raises(RequestError, match=r"input\[0\]: not JPEG"):
        image_bytes(url, "input[0]", max_bytes=9, fetched={"input[0]": b"<!doctype html>"})


def test_sentences_are_not_urls() -> None:
    assert not is_data_url("data: the new oil, they say")
    assert not is_data_url("data:image/png;base64 without a comma")
    assert is_data_url("data:image/svg+xml;base64,AAAA")
    assert is_data_url("data:,")


def test_pixels_stand_on_white_in_order() -> None:
    image = ImageConfig(size=8, fit="stretch")
    red, blue = picture("red", (16, 16)), picture("blue", (16, 16), "WEBP", lossless=True)
    pixels = pixels_of([(red, "a"), (blue, "b")], image, max_pixels=1000)
    assert pixels is not None
    assert (pixels.shape, pixels.dtype) == ((2, 3, 8, 8), torch.uint8)
    assert pixels[0, :, 1, 1].tolist() == [255, 0, 0]
    assert pixels[1, :, 1, 1].tolist() == [0, 0, 255]
    assert pixels_of([], image, max_pixels=1000) is None
