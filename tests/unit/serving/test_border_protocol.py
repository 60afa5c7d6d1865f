"""HTTP as strangers speak it, over raw sockets: every line of it has its documented answer."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from fmray.serving import connections
from fmray.serving.connections import MOST_HEAD
from tests.unit.serving.border_app import Seen, ask, border_app, connect, post, read_reply, running, until


@pytest.fixture(scope="module")
def seen_and_port() -> Iterator[tuple[Seen, int]]:
    app, seen = border_app(deadline_seconds=20, body_seconds=0.5)
    with running(app) as port:
        yield seen, port


@pytest.fixture(scope="module")
def port(seen_and_port: tuple[Seen, int]) -> int:
    return seen_and_port[1]


@pytest.fixture
def seen(seen_and_port: tuple[Seen, int]) -> Seen:
    seen_and_port[0].__init__()  # type: ignore[misc]
    return seen_and_port[0]


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts) + end


def get(path: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "host: x", *headers, "", ""]).encode("latin-1")


CHUNKED = "transfer-encoding: chunked"
JSON = "content-type: application/json"
TEXT = b'{"text": "hello"}'

ANSWERS: dict[str, tuple[bytes, int, str]] = {
    # bodies
    "json": (post("/v1/echo", TEXT), 200, ""),
    "bad json": (post("/v1/echo", b'{"text": '), 400, "invalid_json"),
    "no body": (post("/v1/echo", b""), 400, "invalid_json"),
    "not utf-8": (post("/v1/echo", b'{"text": "\xff"}'), 400, "invalid_request"),
    "utf-16": (post("/v1/echo", '{"text": "a"}'.encode("utf-16")), 400, "invalid_json"),
    "utf-32 without a mark": (post("/v1/echo", '{"text": "a"}'.encode("utf-32-be")), 400, "invalid_json"),
    "utf-8 with a mark": (post("/v1/echo", b"\xef\xbb\xbf" + TEXT), 200, ""),
    "63 deep": (post("/v1/echo", b'{"inputs": ' + b"[" * 63 + b"]" * 63 + b"}"), 200, ""),
    "64 deep": (post("/v1/echo", b'{"inputs": ' + b"[" * 64 + b"]" * 64 + b"}"), 400, "invalid_request"),
    "as deep as the body is long": (post("/v1/echo", b"[" * 2**20), 400, "invalid_request"),
    "objects as deep": (post("/v1/echo", b'{"a":' * 200_000), 400, "invalid_request"),
    "deep in a text": (post("/v1/echo", b'{"text": "' + b"[" * 1000 + b'"}'), 200, ""),
    "the last of two keys counts": (post("/v1/echo", b'{"text": 3, "text": "b"}'), 200, ""),
    "NaN in a text's place": (post("/v1/echo", b'{"text": NaN}'), 400, "invalid_value"),
    "infinity in a list's place": (post("/v1/echo", b'{"inputs": Infinity}'), 400, "invalid_value"),
    "a number of 5000 digits": (
        post("/v1/echo", b'{"number": ' + b"9" * 5000 + b"}"),
        400,
        "invalid_request",
    ),
    "wrong content type": (
        get("/v1/echo", "content-type: text/plain", "content-length: 0", method="POST"),
        415,
        "unsupported_media_type",
    ),
    "no content type": (get("/v1/echo", "content-length: 0", method="POST"), 415, "unsupported_media_type"),
    "content type with a charset": (
        get("/v1/echo", f"{JSON}; charset=utf-8", f"content-length: {len(TEXT)}", method="POST") + TEXT,
        200,
        "",
    ),
    # lengths
    "a length beyond the limit": (post("/v1/echo", b"", "content-length: 1048577"), 413, "request_too_large"),
    "a length of 4000 digits": (
        post("/v1/echo", b"", "content-length: " + "9" * 18),
        413,
        "request_too_large",
    ),
    "chunks without a length": (
        get("/v1/echo", JSON, CHUNKED, method="POST") + chunked(TEXT[:5], TEXT[5:]),
        200,
        "",
    ),
    "chunks beyond the limit": (
        get("/v1/echo", JSON, CHUNKED, method="POST") + chunked(*[b" " * 2**16] * 17),
        413,
        "request_too_large",
    ),
    "a negative length": (post("/v1/echo", b"", "content-length: -1"), 400, "invalid_http"),
    "two lengths": (post("/v1/echo", TEXT, "content-length: 17", "content-length: 18"), 400, "invalid_http"),
    "length and chunks": (
        get("/v1/echo", JSON, CHUNKED, "content-length: 5", method="POST") + chunked(TEXT),
        400,
        "invalid_http",
    ),
    "a chunk whose size is no number": (
        get("/v1/echo", JSON, CHUNKED, method="POST") + b"zz\r\nab\r\n0\r\n\r\n",
        400,
        "invalid_http",
    ),
    # methods and versions
    "HTTP/1.0": (post("/v1/echo", TEXT, version="1.0"), 200, ""),
    "HTTP/9.9": (get("/health", version="9.9"), 400, "invalid_http"),
    "HTTP/2 in the clear": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_http"),
    "OPTIONS": (get("/v1/echo", method="OPTIONS"), 405, "method_not_allowed"),
    "OPTIONS of everything": (get("*", method="OPTIONS"), 404, "not_found"),
    "GET where POST is": (get("/v1/echo"), 405, "method_not_allowed"),
    "PATCH": (get("/v1/models", method="PATCH"), 405, "method_not_allowed"),
    "TRACE": (get("/v1/models", method="TRACE"), 405, "method_not_allowed"),
    "CONNECT": (get("x:443", method="CONNECT"), 400, "invalid_http"),
    "a word that is no method": (get("/health", method="BREW"), 400, "invalid_http"),
    "no HTTP at all": (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4 + b"\r\n\r\n",
        400,
        "invalid_http",
    ),
    "no such route": (get("/v1/nothing"), 404, "not_found"),
    "two slashes": (get("//v1/models"), 404, "not_found"),
    "a path with a line in it": (get("/v1/%0d%0ax-evil:%201"), 404, "not_found"),
    # headers
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 200, ""),
    "a folded header": (get("/health", "x-a: 1\r\n b"), 400, "invalid_http"),
    "a space before the colon": (get("/health", "x-a : 1"), 400, "invalid_http"),
    "a NUL in a header": (get("/health", "x-a: \0"), 400, "invalid_http"),
    "a header of 30 KiB": (get("/health", "x-a: " + "a" * 30 * 1024), 200, ""),
    "a header of 40 KiB": (get("/health", "x-a: " + "a" * 40 * 1024), 431, "headers_too_large"),
    "4000 headers": (get("/health", *[f"x-{i}: 123456" for i in range(4000)]), 431, "headers_too_large"),
    "a path of 40 KiB": (get("/" + "a" * 40 * 1024), 431, "headers_too_large"),
    "ten kinds of nonsense": (get("/health", *[f"x-{i}: \xe9\xff" for i in range(10)]), 200, ""),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_line_has_its_answer(port: int, name: str) -> None:
    request, status, code = ANSWERS[name]
    got, headers, body = ask(port, request)
    assert got == status, body
    assert headers["content-type"] == "application/json"
    assert "server" not in headers
    if status >= 400:
        assert list(body["error"]) == ["message", "type", "param", "code"]
        assert body["error"]["code"] == code
        for inside in ("Traceback", "0x", 'File "', "uvicorn", "pydantic"):
            assert inside not in json.dumps(body)
    assert ask(port, get("/health"))[0] == 200


H11_DIFFERS = {
    "length and chunks": (200, ""),  # the chunks count, as RFC 9112 has it; the connection is not used again
    "HTTP/9.9": (200, ""),
    "HTTP/2 in the clear": (404, "not_found"),
    "CONNECT": (404, "not_found"),
    "a word that is no method": (405, "method_not_allowed"),
    "no host": (400, "invalid_http"),
    "a folded header": (200, ""),
    "a header of 40 KiB": (200, ""),  # it came in one read; what comes in many is bounded
    "4000 headers": (200, ""),
    "a path of 40 KiB": (404, "not_found"),
}
"""h11 is stricter in one thing and more patient in others; nothing of it passes the border unseen."""


def test_every_line_has_its_answer_without_httptools_too() -> None:
    """uvicorn as `fmray[serve]` alone brings it."""
    with running(border_app(body_seconds=0.5)[0], connections._bounded_h11()) as port:
        got = {}
        for name, (request, status, code) in ANSWERS.items():
            answer, _, body = ask(port, request)
            told = body.get("error", {}).get("code", "")
            if (answer, told) != (status, code):
                got[name] = (answer, told)
    assert got == H11_DIFFERS


def test_the_last_of_two_keys_counts(port: int) -> None:
    assert ask(port, post("/v1/echo", b'{"text": "a", "text": "b"}'))[2]["text"] == "b"


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_head_is_get_without_a_body(port: int, path: str) -> None:
    with connect(port) as raw:
        raw.sendall(get(path, method="HEAD") + get("/v1/models"))
        head = b""
        while head.count(b"\r\n\r\n") < 2:
            head += raw.recv(65536)
    first, _, rest = head.partition(b"\r\n\r\n")
    assert b" 200 " in first.split(b"\r\n")[0]
    assert b"content-length: 15" in first
    assert rest.startswith(b"HTTP/1.1 200 ")  # nothing lies between the two answers


def test_a_refused_method_names_the_ones_that_are_taken(port: int) -> None:
    assert ask(port, get("/v1/echo"))[1]["allow"] == "POST"


def test_http_1_0_ends_its_connection(port: int) -> None:
    with connect(port) as raw:
        raw.sendall(post("/v1/echo", TEXT, version="1.0"))
        status, headers, _, _ = read_reply(raw)
        assert (status, headers["connection"], raw.recv(1)) == (200, "close", b"")


def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    with connect(port) as raw:
        texts = [f"{i}" for i in range(6)]
        raw.sendall(b"".join(post("/v1/echo", json.dumps({"text": text}).encode()) for text in texts))
        left, answers = b"", []
        for _ in texts:
            status, _, body, left = read_reply(raw, left)
            assert status == 200
            answers.append(json.loads(body)["text"])
    assert answers == texts


def test_who_asks_first_is_told_to_go_on_or_not_to_begin(port: int) -> None:
    expect = "expect: 100-continue"
    with connect(port) as raw:
        raw.sendall(post("/v1/echo", b"", expect, f"content-length: {len(TEXT)}"))
        assert raw.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        raw.sendall(TEXT)
        assert read_reply(raw)[0] == 200
    for headers, status in (([expect, "content-length: 99999999"], 413),):
        with connect(port) as raw:
            raw.sendall(post("/v1/echo", b"", *headers))
            assert raw.recv(100, socket.MSG_PEEK).startswith(b"HTTP/1.1 413")
            assert read_reply(raw)[0] == status


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ("my-id.1:a_B", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("a\tb", False),
        ("\xe9", False),
        ("", False),
        ("<script>", False),
        ("a%0d%0aset-cookie:x", False),
    ],
)
def test_nothing_is_smuggled_into_a_header(port: int, sent: str, echoed: bool) -> None:
    _, headers, _ = ask(port, post("/v1/echo", TEXT, f"x-request-id: {sent}"))
    assert (headers["x-request-id"] == sent) is echoed
    assert echoed or headers["x-request-id"].startswith("req_")
    assert "set-cookie" not in headers


def test_trailers_are_no_headers(port: int, seen: Seen) -> None:
    end = b"0\r\nx-late: 1\r\nauthorization: Bearer x\r\n\r\n"
    assert ask(port, get("/v1/echo", JSON, CHUNKED, method="POST") + chunked(TEXT, end=end))[0] == 200
    assert seen.headers
    assert not {"x-late", "authorization"} & seen.headers.keys()


def test_serves_headers_do_not_pass(port: int, seen: Seen) -> None:
    for asked, least, most in (
        ("3.5", 3, 3.5),
        ("0", 0, 0.1),
        ("-5", 0, 0.1),
        ("1e9", 19, 20),
        ("inf", 19, 20),
    ):
        ask(
            port,
            post(
                "/v1/echo", TEXT, f"x-request-timeout-seconds: {asked}", "x-request-disconnect-disabled: ?1"
            ),
        )
        assert least <= seen.deadline <= most, asked
        assert not {"x-request-timeout-seconds", "x-request-disconnect-disabled"} & seen.headers.keys()
    for asked in ("nan", "soon", "", "0x10"):
        ask(port, post("/v1/echo", TEXT, f"x-request-timeout-seconds: {asked}"))
        assert 19 < seen.deadline <= 20, asked


def test_times_are_told(port: int) -> None:
    headers = ask(port, post("/v1/echo", TEXT))[1]
    assert (headers["x-queue-ms"], headers["x-inference-ms"]) == ("1.5", "250.0")
    assert 0 <= int(headers["openai-processing-ms"]) < 1000


# --------------------------------------------------------------------------------------- time, and those who leave


def test_a_slow_body_is_refused(port: int) -> None:
    with connect(port) as raw:
        raw.sendall(post("/v1/echo", b'{"te', "content-length: 17"))
        start = time.monotonic()
        for byte in b'xt":':  # it drips: the whole body has to be there in time
            time.sleep(0.1)
            raw.sendall(bytes([byte]))
        status, headers, body, _ = read_reply(raw)
        assert 0.4 < time.monotonic() - start < 2
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(body)["error"]["code"] == "body_timeout"
        assert raw.recv(1) == b""


def test_a_connection_that_says_nothing_is_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    for begin in (b"", b"GET /health HT"):
        with connect(port) as raw:
            raw.sendall(begin)
            assert raw.recv(1) == b""


@pytest.mark.parametrize("protocol", [connections._bounded_httptools, connections._bounded_h11])
def test_endless_headers_are_not_kept(protocol: Callable[[], object]) -> None:
    with running(border_app()[0], protocol()) as port, connect(port) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nx-a: ")
        sent = 0
        try:
            while sent < 100 * MOST_HEAD:
                sent += raw.send(b"a" * 4096)
        except OSError:
            pass
        assert sent < 100 * MOST_HEAD


def test_a_deadline_ends_the_work(port: int, seen: Seen) -> None:
    start = time.monotonic()
    status, headers, body = ask(port, post("/v1/slow", b'{"number": 9}', "x-request-timeout-seconds: 0.2"))
    assert 0.4 < time.monotonic() - start < 2
    assert (status, body["error"]["code"], headers["retry-after"]) == (504, "deadline_exceeded", "1")
    assert (seen.cancelled, seen.finished) == (1, 0)


def test_an_answer_that_has_begun_may_go_on(port: int, seen: Seen) -> None:
    with connect(port) as raw:
        raw.sendall(post("/v1/stream", b'{"number": 40}', "x-request-timeout-seconds: 0.1"))
        got = b""
        while not got.endswith(b"0\r\n\r\n"):
            got += raw.recv(65536)
    assert got.count(b"data: ") == 40


@pytest.mark.parametrize("path", ["/v1/slow", "/v1/stream"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_who_leaves_ends_his_work(port: int, seen: Seen, path: str, how: str) -> None:
    raw = connect(port)
    raw.sendall(post(path, b'{"number": 1000}'))
    time.sleep(0.15)
    if how == "reset":
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()
    assert until(lambda: seen.cancelled == 1)
    assert seen.finished == 0
    streamed = seen.streamed
    time.sleep(0.1)
    assert seen.streamed == streamed


def test_who_leaves_before_his_body_is_there_leaves_nothing(port: int, seen: Seen) -> None:
    for _ in range(20):
        with connect(port) as raw:
            raw.sendall(post("/v1/slow", b"{", "content-length: 1000"))
    assert ask(port, post("/v1/echo", TEXT))[0] == 200
    assert (seen.cancelled, seen.finished) == (0, 0)


def test_a_storm_of_connections_passes(port: int, seen: Seen) -> None:
    for _ in range(300):
        with connect(port) as raw:
            raw.sendall(post("/v1/slow", b'{"number": 30}'))
    assert until(lambda: ask(port, get("/health"))[0] == 200)
    assert until(lambda: seen.cancelled >= 250)  # of a few the request was not even read
    assert seen.finished == 0


def test_a_quiet_client_is_not_taken_for_one_that_left(port: int, seen: Seen) -> None:
    status, _, body = ask(port, post("/v1/slow", b'{"number": 0.6, "text": "there"}'))
    assert (status, body["text"], seen.finished) == (200, "there", 1)


def test_a_broken_stream_does_not_look_whole(port: int) -> None:
    with connect(port) as raw:
        raw.sendall(post("/v1/stream", b'{"number": 3, "text": "break"}'))
        got = b""
        while part := raw.recv(65536):
            got += part
    assert b"data: 0" in got
    assert not got.endswith(b"0\r\n\r\n")
