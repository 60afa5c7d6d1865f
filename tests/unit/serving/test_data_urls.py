from __future__ import annotations

import base64

import pytest
import torch

from fmray.config.schema import ImageConfig
from fmray.errors import RequestError
from fmray.serving.images import image_bytes, is_data_url, pixels_of
from tests.endpoint import data_url, picture

PNG = picture()
BASE64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "url",
    [
        data_url(PNG),
        data_url(PNG, "image/jpeg"),  # the declared type is not believed
        f"DATA:IMAGE/PNG;BASE64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"data:image/png;charset=utf-8;base64,{BASE64}",
        f"data:image/png;base64,{BASE64.rstrip('=')}",
        f"data:image/png;base64,{BASE64.translate(str.maketrans('+/', '-_'))}",
        "data:image/png;base64," + "\r\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
        f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
    ],
)
def test_every_spelling_of_base64_gives_the_same_bytes(url: str) -> None:
    assert image_bytes(url, "input[0]", max_bytes=len(PNG)) == PNG


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.com/cat.png", "url_not_allowed"),
        ("http://169.254.169.254/latest/meta-data", "url_not_allowed"),
        ("file:///etc/passwd", "url_not_allowed"),
        ("/etc/passwd", "url_not_allowed"),
        (BASE64, "url_not_allowed"),
        (f"data:text/html;base64,{BASE64}", "unsupported_image_format"),
        (f"data:image/png,{BASE64}", "invalid_image"),
        ("data:image/png;base64,", "invalid_image"),
        ("data:image/png;base64,====", "invalid_image"),
        ("data:image/png;base64,A", "invalid_image"),
        ("data:image/png;base64,ab$d", "invalid_image"),
        ("data:image/png;base64,äöü", "invalid_image"),
        (f"data:image/png;base64,{BASE64}!", "invalid_image"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "unsupported_image_format"),
        (data_url(b"%PDF-1.7 and so on"), "unsupported_image_format"),
        (data_url(PNG + b"\0" * 100), "image_too_large"),
    ],
)
def test_what_is_not_a_picture_is_named(url: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        image_bytes(url, "input[7]", max_bytes=len(PNG))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, "input[7]")
    assert caught.value.message.startswith("input[7]")


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
