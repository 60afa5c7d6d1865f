"""A scorer behind a real HTTP server in a thread, which is slow, broken, wrong or gone as a test needs it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fmray.config.rewards import HttpReward
from fmray.errors import ConfigError
from fmray.rlhf import scorers_remote
from fmray.rlhf.records import Scores
from fmray.rlhf.scorers import build_scorer
from tests.unit.rlhf.answers import answers
from tests.unit.rlhf.judges import HERE

Answer = Callable[["Handler", dict[str, Any]], None]


class Server(ThreadingHTTPServer):
    """What it is asked, it answers with the next of `script`; the last one stays."""

    daemon_threads = True
    script: list[Answer]
    asked: list[tuple[str, dict[str, Any], dict[str, str]]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, dict(self.headers)))
        script = self.server.script
        answer = script.pop(0) if len(script) > 1 else script[0]
        answer(self, body)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, {}, dict(self.headers)))
        self.send(200, b'{"scores": [9, 9]}')

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def lengths(handler: Handler, body: dict[str, Any]) -> None:
    handler.send(200, json.dumps({"scores": [len(text) for text in body["texts"]]}).encode())


def says(status: int, body: bytes = b"", **headers: str) -> Answer:
    return lambda handler, _: handler.send(status, body, **headers)


def hangs_up(handler: Handler, _: dict[str, Any]) -> None:
    handler.connection.close()


def stops_halfway(handler: Handler, _: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"scores"')


def sleeps(handler: Handler, body: dict[str, Any]) -> None:
    time.sleep(1.0)
    with suppress(OSError):
        lengths(handler, body)


def drips(handler: Handler, _: dict[str, Any]) -> None:
    """A byte now and then: no wait is long, all together are."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    for _ in range(30):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(scorers_remote, "PAUSES", (0.01, 0.02))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served = Server(("127.0.0.1", 0), Handler)
    served.asked, served.script = [], [lengths]
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def ask(server: Server, *texts: str, **keys: object) -> Scores:
    config = HttpReward.model_validate({"url": server.url, **keys})
    return build_scorer(config, HERE).score(
        answers(texts or ("so", "so on"), prompts=["ask"] * len(texts or "12"))
    )


def test_texts_and_prompts_are_posted_in_batches_and_scores_come_back_in_order(server: Server) -> None:
    texts = ["one", "three", "", "déjà vu", "\u2028 😀"]
    scores = ask(server, *texts, batch_size=2)
    assert scores.raw_B.tolist() == [len(text) for text in texts]
    assert scores.failures == ()
    bodies = [body for _, body, _ in server.asked]
    assert [body["texts"] for body in bodies] == [texts[:2], texts[2:4], texts[4:]]
    assert [len(body["prompts"]) for body in bodies] == [2, 2, 1]
    assert ask(server, "so", text="prompt_and_response").raw_B.tolist() == [6.0]


def test_headers_take_variables_of_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "s3cret")
    ask(server, headers={"Authorization": "Bearer $SCORER_TOKEN", "X-Plain": "costs 3"})
    headers = server.asked[0][2]
    assert (headers["Authorization"], headers["X-Plain"]) == ("Bearer s3cret", "costs 3")
    assert headers["Content-Type"] == "application/json"


def test_headers_that_cannot_be_sent_are_config_errors(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setenv("TWO_LINES", "s3cret\r\nX-Injected: 1")
    for headers, message in (
        ({"Authorization": "$NOT_SET"}, "variable NOT_SET is not set"),
        ({"Authorization": "$TWO_LINES"}, "no HTTP header"),
        ({"X Y": "1"}, "no HTTP header"),
    ):
        with pytest.raises(ConfigError, match=r"rewards\.\*\.headers\.") as caught:
            ask(server, headers=headers)
        assert message in str(caught.value)
        assert "s3cret" not in str(caught.value)
    assert server.asked == []


@pytest.mark.parametrize("passing", [says(500), says(503), says(429), says(408), hangs_up, stops_halfway])
def test_what_may_pass_is_tried_again(server: Server, passing: Answer) -> None:
    server.script = [passing, passing, lengths]
    scores = ask(server, tries=3)
    assert scores.raw_B.tolist() == [2.0, 5.0]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("passing", "why"), [(says(500), "answers 500 Internal Server Error"), (hangs_up, "cannot be asked: ")]
)
def test_after_all_tries_every_sample_of_the_batch_has_failed(
    server: Server, passing: Answer, why: str
) -> None:
    server.script = [passing]
    scores = ask(server, tries=2)
    assert scores.raw_B.isnan().all()
    assert len(server.asked) == 2
    assert scores.failures[0].startswith("sample 60 (prompt 'ask', response 'so'): http://127.0.0.1:")
    assert why in scores.failures[0]
    assert scores.failures[1].startswith("sample 61 ")
    assert scores.failures[1].endswith("(2 tries)")


def test_one_batch_that_fails_leaves_the_others_their_scores(server: Server) -> None:
    server.script = [lengths, says(400), lengths]
    scores = ask(server, "a", "bb", "ccc", batch_size=1)
    assert scores.raw_B.isnan().tolist() == [False, True, False]
    assert len(scores.failures) == 1


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (says(400), "answers 400 Bad Request"),
        (says(404), "answers 404 Not Found"),
        (says(200, b"<html>"), "answers no JSON: b'<html>'"),
        (says(200, b""), "answers no JSON"),
        (says(200, b"\xff\xfe{"), "answers no JSON"),
        (says(200, b"[1, 2]"), "answers JSON without 'scores'"),
        (says(200, b'{"score": [1, 2]}'), "answers JSON without 'scores'"),
        (says(200, b'{"scores": [1]}'), "there are 1 scores for 2 texts"),
        (says(200, b'{"scores": 1}'), "the scores are 1, not a list of 2 numbers"),
        (says(200, b'{"scores": "12"}'), "the scores are '12', not a list of 2 numbers"),
    ],
)
def test_a_wrong_answer_is_final_and_named(server: Server, answer: Answer, why: str) -> None:
    server.script = [answer]
    scores = ask(server, tries=5)
    assert scores.raw_B.isnan().all()
    assert len(scores.failures) == 2
    assert why in scores.failures[0]
    assert len(server.asked) == 1


def test_nan_and_null_fail_their_samples_alone(server: Server) -> None:
    server.script = [says(200, b'{"scores": [NaN, 1.5, null, Infinity]}')]
    scores = ask(server, "a", "b", "c", "d")
    assert scores.raw_B.isnan().tolist() == [True, False, True, True]
    assert [line.split()[1] for line in scores.failures] == ["60", "62", "63"]
    assert "its score is nan" in scores.failures[0]
    assert "its score is None" in scores.failures[1]


@pytest.mark.parametrize("late", [sleeps, drips])
def test_an_answer_that_takes_too_long_is_left(server: Server, late: Answer) -> None:
    server.script = [late]
    started = time.monotonic()
    scores = ask(server, request_timeout_seconds=0.3, tries=1)
    assert time.monotonic() - started < 1.2
    assert scores.raw_B.isnan().all()
    assert "did not answer within 0.3 s (1 tries)" in scores.failures[0]


def test_a_huge_answer_is_not_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers_remote, "MAX_ANSWER_BYTES", 1000)
    server.script = [says(200, b'{"scores": [1, 2]}' + b" " * 5_000_000)]
    scores = ask(server)
    assert "answers more than 1000 bytes" in scores.failures[0]
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{port}/elsewhere", "file:///etc/hostname", "ftp://127.0.0.1/x"]
)
def test_a_redirect_is_not_followed(server: Server, status: int, target: str) -> None:
    address = target.format(port=server.server_port)
    server.script = [says(status, Location=address)]
    scores = ask(server, headers={"Authorization": "secret"})
    assert scores.raw_B.isnan().all()
    assert [path for path, _, _ in server.asked] == ["/score"]
    assert f"redirects to {address}" in scores.failures[0]


def test_nobody_there(server: Server) -> None:
    url = server.url
    server.server_close()
    config = HttpReward(url=url, tries=2, request_timeout_seconds=1)
    scores = build_scorer(config, HERE).score(answers(["a"]))
    assert "cannot be asked: ConnectionRefusedError" in scores.failures[0]


def test_an_address_without_a_host_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.\*\.url='http://:80/x'"):
        build_scorer(HttpReward(url="http://:80/x"), HERE)
