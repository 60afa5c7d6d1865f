"""Fetching pictures from real sockets: what a host may answer, where it may be, how long and how much it may send."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest

from fmray.config.serving import FetchConfig
from fmray.errors import RequestError
from fmray.serving.fetch import Fetcher
from tests.web_host import Answer, moved, reply, web_host

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8
MOST = 10_000
NAME = "pictures.test"
HERE = ["127.0.0.1"]


async def here(_host: str, _port: int) -> Sequence[str]:
    return HERE


def is_here(address: IPv4Address | IPv6Address) -> bool:
    return address.is_loopback


def fetcher(port: int, *hosts: str, most: int = MOST, **options: Any) -> Fetcher:
    """Takes `pictures.test`, which is on this machine, and more hosts."""
    seams = {key: options.pop(key) for key in ("resolve", "is_allowed", "tls", "count") if key in options}
    config = FetchConfig(hosts=(f"{NAME}:{port}", *hosts), **options)
    return Fetcher(config, most, **{"resolve": here, "is_allowed": is_here, **seams})


def fetched(answers: dict[str, Answer], path: str = "/", **options: Any) -> bytes:
    """What comes from one such host, which must have been let go of at the end."""

    async def scenario() -> bytes:
        async with web_host(answers) as host:
            try:
                return await fetcher(host.port, **options).fetch(
                    f"http://{NAME}:{host.port}{path}", "input[3]"
                )
            finally:
                await until(lambda: host.open == 0)

    return asyncio.run(scenario())


async def until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("never became true")


def refused(work: Callable[[], object], code: str, message: str, param: str | None = "input[3]") -> None:
    with pytest.raises(RequestError) as caught:
        work()
    error = caught.value
    assert (error.status, error.code, error.param) == (
        413 if code == "request_too_large" else 400,
        code,
        param,
    )
    assert error.message == (message if param is None else f"{param}: {message}")
    assert error.__suppress_context__ or error.__context__ is None


# ---------------------------------------------------------------------------------------------------- what is read

CHUNKS = b"".join(
    b"%x\r\n%s\r\n" % (len(part), part) for part in (PICTURE[:5], PICTURE[5:1000], PICTURE[1000:])
)
OK = "HTTP/1.1 200 OK\r\n"
SOUND: dict[str, dict[str, Answer]] = {
    "with a length": {"/": reply(PICTURE)},
    "in chunks": {"/": f"{OK}Transfer-Encoding: chunked\r\n\r\n".encode() + CHUNKS + b"0\r\n\r\n"},
    "until the connection ends": {"/": f"{OK}\r\n".encode() + PICTURE},
    "HTTP/1.0": {"/": b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE},
    "of a wrong type": {"/": reply(PICTURE, "200 OK", "Content-Type: text/html")},
    "said to be as it is": {"/": reply(PICTURE, "200 OK", "Content-Encoding: identity")},
    "behind early hints": {"/": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + reply(PICTURE)},
    "with more behind its length": {"/": reply(PICTURE + b"more", length=len(PICTURE))},
    "exactly as large as allowed": {"/": reply(PICTURE + bytes(MOST - len(PICTURE)))},
    "moved within": {"/": moved("/there"), "/there": reply(PICTURE)},
    "moved beside": {"/": moved("b/../there?x"), "/there?x": reply(PICTURE)},
    "moved three times": {
        "/": moved("/1"),
        "/1": moved("/2", "307 -"),
        "/2": moved("/3", "308 -"),
        "/3": reply(PICTURE),
    },
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_answers(case: str) -> None:
    assert fetched(SOUND[case])[: len(PICTURE)] == PICTURE


def test_the_request_is_bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of the environment, no cookie that a redirect has set, nothing compressed."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    answers = {"/a?b=%20": moved("/c", "302 Found", "Set-Cookie: a=b"), "/c": reply(PICTURE)}

    async def scenario() -> tuple[int, list[str]]:
        async with web_host(answers) as host:
            url = f"http://{NAME}:{host.port}/a?b=%20#part"
            assert await fetcher(host.port).fetch(url, "x") == PICTURE
            return host.port, host.heads

    port, heads = asyncio.run(scenario())
    lines = ["User-Agent: fmray", "Accept: image/jpeg, image/png, image/webp, image/gif, image/bmp"]
    lines += ["Accept-Encoding: identity", "Connection: close", "", ""]
    for head, target in zip(heads, ("/a?b=%20", "/c"), strict=True):
        assert head.split("\r\n") == [f"GET {target} HTTP/1.1", f"Host: {NAME}:{port}", *lines]


# ------------------------------------------------------------------------------------------------- what is refused

TOO_LARGE = "the picture has more than 10,000 bytes"
BROKEN = "the host cannot be reached, or its answer cannot be read"
COMPRESSED = "the host sends the picture compressed, which is not read"
ELSEWHERE = "a redirect leads where pictures are not fetched from"
LATE = "the host did not answer in time"


async def endless(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"{OK}\r\n".encode())
    while True:
        writer.write(b"SECRET" * 1000)
        await writer.drain()


async def endless_chunks(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"{OK}Transfer-Encoding: chunked\r\n\r\n".encode())
    while True:
        writer.write(b"1\r\n?\r\n" * 100)
        await writer.drain()


async def endless_extensions(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"{OK}Transfer-Encoding: chunked\r\n\r\n".encode())
    while True:
        writer.write(b"1;SECRET=%s\r\n?\r\n" % (b"x" * 900) * 20)
        await writer.drain()


async def endless_hints(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)
        await writer.drain()


async def endless_headers(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(OK.encode())
    while True:
        writer.write(b"X: SECRET\r\n" * 100)
        await writer.drain()


async def slow_head(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for letter in f"{OK}\r\n":
        writer.write(letter.encode())
        await writer.drain()
        await asyncio.sleep(0.2)


async def slow_body(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(reply(length=1000))
    while True:
        writer.write(b"?")
        await writer.drain()
        await asyncio.sleep(0.2)


async def silence(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()  # until the client leaves
    raise ConnectionResetError


def status(code: int) -> str:
    return f"the host answered {code} instead of 200"


UNSOUND: dict[str, tuple[Answer, str, str]] = {
    "not found": (reply(b"SECRET", "404 SECRET"), "url_unreachable", status(404)),
    "failure": (reply(b"SECRET", "500 SECRET"), "url_unreachable", status(500)),
    "forbidden": (reply(b"SECRET", "403 SECRET"), "url_unreachable", status(403)),
    "no content": (b"HTTP/1.1 204 SECRET\r\n\r\n", "url_unreachable", status(204)),
    "a part": (reply(PICTURE, "206 Partial Content"), "url_unreachable", status(206)),
    "not modified": (b"HTTP/1.1 304 SECRET\r\n\r\n", "url_unreachable", status(304)),
    "moved nowhere": (reply(b"SECRET", "302 Found"), "url_unreachable", status(302)),
    "many choices": (moved("/", "300 Multiple Choices"), "url_unreachable", status(300)),
    "gzip": (
        reply(gzip.compress(PICTURE), "200 OK", "Content-Encoding: gzip"),
        "url_unreachable",
        COMPRESSED,
    ),
    "gzip bomb": (
        reply(gzip.compress(bytes(10**6)), "200 OK", "Content-Encoding: x-gzip"),
        "url_unreachable",
        COMPRESSED,
    ),
    "gzip behind identity": (
        reply(PICTURE, "200 OK", "Content-Encoding: identity", "Content-Encoding: br"),
        "url_unreachable",
        COMPRESSED,
    ),
    "gzip in transit": (
        f"{OK}Transfer-Encoding: gzip, chunked\r\n\r\n".encode() + CHUNKS,
        "url_unreachable",
        BROKEN,
    ),
    "a byte too many": (reply(bytes(MOST + 1)), "image_too_large", TOO_LARGE),
    "too long by its header": (reply(b"", length=MOST + 1), "image_too_large", TOO_LARGE),
    "far too long by its header": (reply(b"", length=10**19), "image_too_large", TOO_LARGE),
    "shorter than its header": (reply(PICTURE, length=9_000), "url_unreachable", BROKEN),
    "a length below nothing": (reply(PICTURE, length=-1), "url_unreachable", BROKEN),
    "two lengths": (reply(PICTURE, "200 OK", "Content-Length: 3"), "url_unreachable", BROKEN),
    "chunks without an end": (
        f"{OK}Transfer-Encoding: chunked\r\n\r\n".encode() + CHUNKS,
        "url_unreachable",
        BROKEN,
    ),
    "a chunk of nonsense": (
        f"{OK}Transfer-Encoding: chunked\r\n\r\nSECRET\r\n".encode(),
        "url_unreachable",
        BROKEN,
    ),
    "endless": (endless, "image_too_large", TOO_LARGE),
    "endless crumbs": (endless_chunks, "url_unreachable", "the host answers in crumbs"),
    "endless words about chunks": (endless_extensions, "url_unreachable", "the host answers without end"),
    "endless hints": (endless_hints, "url_unreachable", "the host answers in crumbs"),
    "endless headers": (endless_headers, "url_unreachable", BROKEN),
    "slow head": (slow_head, "url_unreachable", LATE),
    "slow body": (slow_body, "url_unreachable", LATE),
    "silence": (silence, "url_unreachable", LATE),
    "nothing": (b"", "url_unreachable", BROKEN),
    "no HTTP": (b"SSH-2.0-SECRET\r\n", "url_unreachable", BROKEN),
    "HTTP/2": (b"\0\0\x12\4\0\0\0\0\0SECRET", "url_unreachable", BROKEN),
    "a null byte in a header": (f"{OK}X: a\0b\r\n\r\n".encode(), "url_unreachable", BROKEN),
    "moved in circles": (moved("/"), "url_unreachable", "more than 3 redirects"),
    "moved inside": (moved("http://127.0.0.1/"), "url_not_allowed", ELSEWHERE),
    "moved to the metadata": (moved("http://169.254.169.254/latest/"), "url_not_allowed", ELSEWHERE),
    "moved to IPv6": (moved("http://[::1]/"), "url_not_allowed", ELSEWHERE),
    "moved to another host": (moved("https://secret.test/"), "url_not_allowed", ELSEWHERE),
    "moved to another port": (moved(f"http://{NAME}:22/"), "url_not_allowed", ELSEWHERE),
    "moved to a file": (moved("file:///etc/passwd"), "url_not_allowed", ELSEWHERE),
    "moved to data": (moved("data:image/png;base64,AAAA"), "url_not_allowed", ELSEWHERE),
    "moved to a user": (moved(f"http://a@{NAME}/"), "url_not_allowed", ELSEWHERE),
    "moved to nonsense": (moved("http://[SECRET"), "url_not_allowed", ELSEWHERE),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_answers(case: str) -> None:
    answer, code, message = UNSOUND[case]
    seconds = 1.0 if message == LATE else 30.0
    start = time.monotonic()
    refused(lambda: fetched({"/": answer}, total_seconds=seconds, connect_seconds=20), code, message)
    assert time.monotonic() - start < 15


def test_a_moved_picture_is_checked_by_every_rule_again() -> None:
    """A second listed host resolves inside; https leads to http; no redirect is allowed."""
    refused(
        lambda: fetched({"/": moved("/a"), "/a": reply(PICTURE)}, redirects=0),
        "url_unreachable",
        "more than 0 redirects",
    )

    async def resolve(host: str, _port: int) -> Sequence[str]:
        return HERE if host == NAME else ["10.0.0.1"]

    answers: dict[str, Answer] = {"/": moved("http://second.test/")}

    async def scenario() -> bytes:
        async with web_host(answers) as host:
            allowed = fetcher(host.port, "second.test", resolve=resolve)
            return await allowed.fetch(f"http://{NAME}:{host.port}/", "input[3]")

    refused(lambda: asyncio.run(scenario()), "url_not_allowed", "second.test is not a public host")
