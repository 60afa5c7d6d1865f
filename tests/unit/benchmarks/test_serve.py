"""The load generator says what its requests waited for, and `fmray benchmark serve` measures what it says it does."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fmray.benchmarks.load import (
    NO_ANSWER,
    Load,
    Shot,
    Target,
    closed_loop,
    due_times,
    open_loop,
    percentile,
)
from fmray.benchmarks.serve import run_serve
from fmray.benchmarks.serve_bench import QUICK, ServeBench, data_urls
from fmray.benchmarks.serve_processes import Server, get
from fmray.cli import benchmark, door
from fmray.errors import ResourceError
from fmray.runtime.ports import free_port

pytest.importorskip("httptools")


class Slow:
    """An HTTP server that answers one request at a time, each after `seconds`; every third one 429 where it refuses."""

    def __init__(self, seconds: float, *, refuses: bool = False, closes: bool = False) -> None:
        self.seconds, self.refuses, self.closes = seconds, refuses, closes
        self.port, self.asked, self.bodies = free_port(), 0, list[bytes]()
        self._one = asyncio.Lock()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.bodies.append(await reader.readexactly(length))
                self.asked += 1
                if self.closes:
                    break
                refused = self.refuses and self.asked % 3 == 0
                async with self._one:
                    await asyncio.sleep(self.seconds)
                status = b"429 Too Many Requests\r\nRetry-After: 2" if refused else b"200 OK"
                writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    @contextmanager
    def running(self) -> Iterator[Target]:
        loop, up = asyncio.new_event_loop(), threading.Event()

        async def run() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            up.set()
            async with server:
                await server.serve_forever()

        task = loop.create_task(run())
        thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
        thread.start()
        assert up.wait(10)
        try:
            yield Target(self.port, "/v1/embeddings")
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join(10)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.01, 0.5, 0.9, 0.99, 1.0)] == [1, 50, 90, 99, 100]
    assert percentile([3.0], 0.5) == 3.0
    assert math.isnan(percentile([], 0.5))


def test_arrivals_fall_due_at_the_rate_asked_for_and_the_same_again() -> None:
    drawn = list(due_times(200.0, 20.0, seed=1, poisson=True))
    assert drawn == sorted(drawn) == list(due_times(200.0, 20.0, seed=1, poisson=True))
    assert len(drawn) == pytest.approx(4000, rel=0.06)  # a Poisson count: its deviation is 63
    gaps = [after - before for before, after in itertools.pairwise(drawn)]
    assert sum(gap > 0.01 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-2.0), rel=0.15)
    assert len(list(due_times(100.0, 2.0, seed=0, poisson=False))) in (199, 200)


def test_an_open_loop_counts_from_when_a_request_was_due() -> None:
    """50 a second for a server that answers 20: the last ones wait for all before them, on one connection or on many."""
    for connections in (1, 64):
        server = Slow(0.05)
        with server.running() as target:
            load = open_loop(target, [b"{}"], rate=50, seconds=1.0, poisson=False, connections=connections)
        assert load.statuses == {200: len(load.shots)}
        assert len(load.shots) in (49, 50)
        assert load.percentile(1.0) == pytest.approx(len(load.shots) * 0.05 - 1.0, abs=0.4)
        assert load.percentile(0.02) < 0.2
        assert load.rate == pytest.approx(20, rel=0.25)
        assert load.offered == pytest.approx(50, rel=0.1)


def test_a_closed_loop_waits_for_its_answers() -> None:
    server = Slow(0.01, refuses=True)
    with server.running() as target:
        load = closed_loop(target, [b'{"a": 1}', b'{"b": 2}'], clients=3, requests=30)
    assert server.asked == len(load.shots) == 30
    assert {shot.number for shot in load.shots} == set(range(30))
    assert {*server.bodies} == {b'{"a": 1}', b'{"b": 2}'}
    assert load.statuses == {200: 20, 429: 10}
    assert load.percentile(0.5) == pytest.approx(
        0.03, rel=0.5
    )  # three clients of a server that takes one at a time
    assert all(shot.headers["retry-after"] == "2" for shot in load.shots if shot.status == 429)
    assert load.counted == "200: 20, 429: 10"


def test_kept_answers_come_with_their_bodies() -> None:
    server = Slow(0.0)
    with server.running() as target:
        kept = closed_loop(target, [b"{}"], clients=2, requests=4, keep=True)
        left = closed_loop(target, [b"{}"], clients=2, requests=4)
    assert {shot.body for shot in kept.shots} == {b"ok"}
    assert {shot.body for shot in left.shots} == {b""}


def test_a_server_that_hangs_up_or_is_not_there_is_no_answer() -> None:
    server = Slow(0.0, closes=True)
    with server.running() as target:
        assert closed_loop(target, [b"{}"], clients=2, requests=6).statuses == {NO_ANSWER: 6}
    gone = closed_loop(Target(free_port(), "/"), [b"{}"], clients=2, requests=6)
    assert gone.statuses == {NO_ANSWER: 6}
    assert gone.counted == "no answer: 6"
    assert math.isnan(gone.percentile(0.5))


def test_rates_are_of_answers_not_of_refusals() -> None:
    shots = tuple(Shot(n, 0.1 * n, 0.01, 200 if n % 2 else 429, {}, b"") for n in range(1, 11))
    load = Load(shots, seconds=2.0, cpu_seconds=0.001)
    assert load.rate == pytest.approx(2.5)
    assert load.offered == pytest.approx(10.0)
    assert load.cost == pytest.approx(1e-4)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no model here')"]
    with pytest.raises(ResourceError, match=r"^it does not serve: no model here$"):
        Server("it", command, free_port(), "/health").__enter__()
    with pytest.raises(OSError, match=r"."):
        get(free_port(), "/health")


def test_bodies_are_what_clients_send(tmp_path: Path) -> None:
    bench = ServeBench(tmp_path, tmp_path, QUICK)
    body = json.loads(bench.embedding_bodies(bench.photos)[0])
    assert body["input"][0] == data_urls(bench.photos)[0]
    assert body["input"][0].startswith("data:image/jpeg;base64,/9j/")
    chats = [json.loads(body) for body in bench.chat_bodies()]
    assert len(chats) == QUICK.pictures
    assert len({chat["messages"][0]["content"][0]["image_url"]["url"] for chat in chats}) == QUICK.pictures
    assert all(chat["messages"][0]["content"][1]["text"].endswith("?") for chat in chats)


@pytest.mark.slow
def test_the_quick_run_measures_an_endpoint(tmp_path: Path) -> None:
    results = tmp_path / "results.md"
    rows = run_serve(["--quick", "--parts", "latency", "answers", "--results", str(results)])
    assert [row.what.partition(":")[0].partition(",")[0] for row in rows] == ["a tiny model"] * 7
    differ = [row for row in rows if "answers that differ" in row.what]
    assert [row.ratio for row in differ] == [0, 0]
    assert all(row.ratio is not None and row.ratio > 0 for row in rows if row not in differ)
    text = results.read_text(encoding="utf-8")
    assert "fmray benchmark serve --quick --parts latency answers" in text
    assert "load average" in text


def test_an_unknown_part_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(benchmark, ["serve", "--parts", "clap"]) == 1
    assert capsys.readouterr().err == (
        "error: benchmark serve='--parts clap': parts are clip, answers, latency, overload; --help lists the options\n"
    )
