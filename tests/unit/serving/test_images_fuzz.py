"""Damaged pictures without number: each gives pixels or a RequestError, soon, and leaves no memory behind."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fmray.config.schema import ImageConfig
from fmray.errors import RequestError
from fmray.serving.images import image_bytes, pixels_of_one
from tests.hostile_pictures import (
    bmp_of_size,
    chunk,
    encoded,
    exif_of,
    jpeg_of_many_scans,
    known,
    png,
    tiff_tags,
    ycck,
)

IMAGE = ImageConfig(size=16)
CODES = {"invalid_image", "unsupported_image_format", "image_too_large_pixels"}
SLOWEST = 2.0
"""Seconds of CPU for one picture of at most a few kilobytes and a megapixel."""

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8))
SEEDS = [
    *(encoded(NOISE.convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    encoded(known(), interlace=1),
    encoded(known(), exif=exif_of(6)),
    encoded(Image.fromarray(np.full((9, 8), 40_000, dtype=np.uint16))),
    png(
        8,
        8,
        chunk(b"zTXt", b"k\0\0x"),
        chunk(b"iCCP", b"k\0\0x"),
        chunk(b"tRNS", b"\0\1"),
        rows=b"x\x9c\3\0\0\0\0\1",
    ),
    encoded(known(), save_all=True, append_images=[NOISE.convert("RGB").resize((48, 32))] * 2),
    encoded(known(), "JPEG", exif=exif_of(5)),
    encoded(NOISE.convert("RGB"), "JPEG", progressive=True, exif=tiff_tags((0x0112, 2, 99, b"\x1a\0\0\0"))),
    encoded(NOISE.convert("L"), "JPEG"),
    encoded(NOISE.convert("CMYK"), "JPEG"),
    encoded(known(), "MPO", save_all=True, append_images=[known()]),
    ycck(known()),
    jpeg_of_many_scans(20),
    encoded(NOISE, "WEBP", lossless=True),
    encoded(NOISE, "WEBP", exif=exif_of(3)),
    encoded(known(), "WEBP", save_all=True, append_images=[NOISE.convert("RGB").resize((48, 32))] * 2),
    encoded(NOISE.convert("P"), "GIF"),
    encoded(known(), "GIF", save_all=True, append_images=[NOISE.convert("P").resize((48, 32))] * 2),
    encoded(known(), "BMP"),
    bmp_of_size(30, 20, compression=1, rows=b"\5\7\0\2\1\1\0\0" * 60 + b"\0\1"),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A sound picture with bytes set, cut out, doubled, or taken from another one; or a signature and anything."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    if draw(st.integers(0, 9)) == 0:
        return bytes(data[: draw(st.integers(2, 40))]) + draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 80)))
        length = draw(st.integers(0, 40))
        match draw(st.sampled_from(["set", "set", "set", "cut", "double", "splice", "end", "flip"])):
            case "set":
                value = draw(
                    st.sampled_from([b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff"])
                    | st.binary(min_size=1, max_size=4)
                )
                data[place : place + len(value)] = value
            case "cut":
                del data[place : place + length]
            case "double":
                data[place:place] = data[place : place + length] * draw(st.integers(1, 20))
            case "splice":
                other = draw(st.sampled_from(SEEDS))
                start = draw(st.integers(0, len(other)))
                data[place : place + length] = other[start : start + length]
            case "end":
                del data[place:]
            case "flip" if place < len(data):
                data[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def judge(data: bytes) -> None:
    start = time.process_time()
    try:
        pixels_CHW = pixels_of_one(data, "input[0]", IMAGE, max_pixels=1_000_000)
    except RequestError as error:
        refused = error
    else:
        refused = None
        assert (pixels_CHW.shape, pixels_CHW.dtype) == ((3, 16, 16), torch.uint8)
    assert time.process_time() - start < SLOWEST
    if refused is not None:
        assert (refused.status, refused.param) == (400, "input[0]")
        assert refused.code in CODES
        assert refused.message.startswith("input[0]: ")
        assert "0x" not in refused.message
        assert "\n" not in refused.message


FUZZ = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.filterwarnings("ignore:::PIL")
@settings(max_examples=500, **FUZZ)
@given(damaged())
def test_damage_gives_pixels_or_an_answer(data: bytes) -> None:
    judge(data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::PIL")
@settings(max_examples=8000, **FUZZ)
@given(damaged())
def test_much_damage_gives_pixels_or_an_answer(data: bytes) -> None:
    judge(data)


@settings(max_examples=300, **FUZZ)
@given(
    st.text(max_size=60)
    | st.text("+/=-_%2BAaZz09\r\n ,;:", max_size=60).map(lambda text: "data:image/png;base64," + text)
)
def test_any_text_is_bytes_or_an_answer(url: str) -> None:
    try:
        assert 0 < len(image_bytes(url, "input[0]", max_bytes=40)) <= 40
    except RequestError as error:
        refused = (error.status, error.param)
    else:
        refused = (400, "input[0]")
    assert refused == (400, "input[0]")


GROWTH = """
import gc, random, resource, sys
from fmray.errors import RequestError
from fmray.serving.images import pixels_of_one
from tests.unit.serving.test_images_bytes import REFUSED, STRETCH
from tests.unit.serving.test_images_fuzz import SEEDS

draw = random.Random(0)
rounds = int(sys.argv[1])
heavy = {"ten megabytes of scans", "png bomb"}
hostile = [data for name, (data, *_) in REFUSED.items() if name not in heavy]

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def one_round():
    for data in hostile:
        answer(data)
    for _ in range(300):
        damaged = bytearray(draw.choice(SEEDS))
        for _ in range(draw.choice([1, 2, 8])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        answer(bytes(damaged))

def answer(data):
    try:
        pixels_of_one(data, "x", STRETCH, max_pixels=1_000_000)
    except RequestError:
        pass

for _ in range(3):
    one_round()
before = resident()
for _ in range(rounds):
    one_round()
registries = [getattr(module, "__warningregistry__", {}) for name, module in sys.modules.items() if name.startswith("PIL.")]
kept = sum(key != "version" for registry in registries for key in registry)
print(resident() - before, kept)
"""


@pytest.mark.parametrize("rounds", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_nothing_grows_and_nothing_is_printed(rounds: int) -> None:
    """In a process of its own: pytest has filters of warnings, and memory, of its own."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(rounds)], capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    grown, warnings_kept = map(int, done.stdout.split())
    assert grown < 8 * 2**20
    assert warnings_kept == 0
