"""Load for an endpoint over raw HTTP/1.1: clients that wait for their answers, or arrivals that wait for nobody.

Open loop: requests are due at times drawn beforehand, whatever the endpoint does, and a request's latency counts from when it was
due: one that could not be sent, because others still waited, has waited too (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, TypeVar, cast

from fmray.errors import require_package

NO_ANSWER = 0
"""In place of a status: the connection was refused, or ended before the answer did."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. `Target(8000, "/v1/embeddings")`"""

    port: int
    path: str
    method: str = "POST"
    host: str = "127.0.0.1"

    def request(self, body: bytes = b"") -> bytes:
        """All bytes of one request on a connection that is kept."""
        head = f"{self.method} {self.path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n"
        if self.method != "GET":
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + body


@dataclass(frozen=True, slots=True)
class Shot:
    """One request. `Shot(number=3, due=0.0125, seconds=0.004, status=200, headers={}, body=b"")`"""

    number: int
    """Its place among those of the run; the body was `number` modulo how many bodies there are."""
    due: float
    """Seconds from the run's start."""
    seconds: float
    """From due (open loop) or sent (closed loop) to the answer's last byte."""
    status: int
    headers: dict[str, str]
    """Lower-case names; empty where nothing was kept and the status is 200."""
    body: bytes
    """Empty where nothing was kept."""


@dataclass(frozen=True)
class Load:
    """What became of a run's requests."""

    shots: tuple[Shot, ...]
    seconds: float
    """From the run's start to the last answer."""
    cpu_seconds: float
    """Of this process: what the generator itself cost."""

    @cached_property
    def statuses(self) -> dict[int, int]:
        """How many answers of each."""
        return dict(sorted(Counter(shot.status for shot in self.shots).items()))

    @property
    def answered(self) -> int:
        """How many 200."""
        return self.statuses.get(200, 0)

    @property
    def rate(self) -> float:
        """Answers of status 200 a second."""
        return self.answered / self.seconds

    @property
    def offered(self) -> float:
        """Requests that were due a second."""
        return len(self.shots) / max(max((shot.due for shot in self.shots), default=0.0), 1e-9)

    @property
    def cost(self) -> float:
        """CPU seconds of the generator for one request."""
        return self.cpu_seconds / max(1, len(self.shots))

    def percentile(self, share: float) -> float:
        """Seconds within which this share of the 200s was there. `load.percentile(0.99)`; nan where there was none."""
        return percentile([shot.seconds for shot in self.shots if shot.status == 200], share)

    @property
    def shown(self) -> str:
        """`p50 12.1 ms, p90 14.0, p99 20.3`"""
        p50, p90, p99 = (1000 * self.percentile(share) for share in (0.5, 0.9, 0.99))
        return f"p50 {p50:.3g} ms, p90 {p90:.3g}, p99 {p99:.3g}"

    @property
    def counted(self) -> str:
        """`200: 1234, 429: 5`"""
        names = {NO_ANSWER: "no answer"}
        return ", ".join(f"{names.get(status, status)}: {count}" for status, count in self.statuses.items())


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of them does not exceed; nan where there is none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


# -------------------------------------------------------------------------------------------------------------- two loops


def closed_loop(
    target: Target,
    bodies: Sequence[bytes],
    *,
    clients: int,
    requests: int,
    keep: bool = False,
    warm: int = 0,
) -> Load:
    """So many clients, each sending its next request when it has its answer, until `requests` are answered.

    keep: the answers' headers and bodies stay in the shots. warm: requests before them that are not counted; after them all
    clients wait for each other, so that a run begins with an idle endpoint.
    """

    async def run() -> Load:
        pool = _Pool(target, clients)
        if warm:
            await _clients(pool, bodies, clients, warm, keep=False)
        load = await _timed(_clients(pool, bodies, clients, requests, keep=keep))
        pool.close()
        return load

    return run_loop(run())


async def _clients(
    pool: _Pool, bodies: Sequence[bytes], clients: int, requests: int, *, keep: bool
) -> list[Shot]:
    numbers, shots = iter(range(requests)), list[Shot]()
    requests_ = [pool.target.request(body) for body in bodies]
    began = time.perf_counter()

    async def client() -> None:
        for number in numbers:
            sent = time.perf_counter()
            shots.append(
                await pool.shoot(requests_[number % len(requests_)], number, sent - began, sent, keep=keep)
            )

    await asyncio.gather(*(client() for _ in range(min(clients, requests))))
    return shots


def open_loop(
    target: Target,
    bodies: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    seed: int = 0,
    poisson: bool = True,
    connections: int = 1024,
    keep: bool = False,
) -> Load:
    """Requests at `rate` a second for so long, as they fall due; then their answers are awaited.

    poisson: exponential gaps, else equal ones. connections: most at a time; where all are busy, a request waits for one, and its
    latency grows.
    """

    async def run() -> Load:
        pool = _Pool(target, connections)
        load = await _timed(_arrivals(pool, bodies, due_times(rate, seconds, seed, poisson), keep=keep))
        pool.close()
        return load

    return run_loop(run())


async def _arrivals(pool: _Pool, bodies: Sequence[bytes], due: Iterator[float], *, keep: bool) -> list[Shot]:
    requests = [pool.target.request(body) for body in bodies]
    tasks: list[asyncio.Task[Shot]] = []
    began = time.perf_counter()
    for number, at in enumerate(due):
        if (left := began + at - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        elif number % 16 == 0:
            await asyncio.sleep(0)  # behind its times: answers must still be read
        request = requests[number % len(requests)]
        tasks.append(asyncio.create_task(pool.shoot(request, number, at, began + at, keep=keep)))
    return list(await asyncio.gather(*tasks))


def due_times(rate: float, seconds: float, seed: int, poisson: bool) -> Iterator[float]:
    """Seconds from the start at which requests are due: about `rate` of them a second, in rising order."""
    draw, at = random.Random(seed), 0.0
    while True:
        at += draw.expovariate(rate) if poisson else 1 / rate
        if at > seconds:
            return
        yield at


async def _timed(shots: Awaitable[list[Shot]]) -> Load:
    began, cpu = time.perf_counter(), time.process_time()
    found = await shots
    return Load(tuple(found), time.perf_counter() - began, time.process_time() - cpu)


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """On uvloop's event loop where it is installed, which costs less, else on asyncio's own."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if find_spec("uvloop") is not None:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


def median_of(values: Sequence[float]) -> float:
    """The median; nan where there is none."""
    return statistics.median(values) if values else float("nan")


# ------------------------------------------------------------------------------------------------------------- connections


@dataclass
class _Pool:
    """Connections that are kept open; the one that was used last is used next."""

    target: Target
    most: int
    _idle: list[_Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_package("httptools", "ray", "the load generator")
        self._room = asyncio.Semaphore(self.most)

    async def shoot(
        self, request: bytes, number: int, due: float, counted_from: float, *, keep: bool
    ) -> Shot:
        """Send it and wait for its answer; a connection that breaks is no exception but `NO_ANSWER`."""
        async with self._room:
            try:
                connection = await self._connection()
                status, headers, body = await connection.ask(request)
            except OSError:
                status, headers, body = NO_ANSWER, {}, b""
            else:
                if connection.usable:
                    self._idle.append(connection)
        took = time.perf_counter() - counted_from
        if not keep:
            body, headers = b"", (headers if status != 200 else {})
        return Shot(number, due, took, status, headers, body)

    async def _connection(self) -> _Connection:
        while self._idle:
            if (connection := self._idle.pop()).usable:
                return connection
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Connection, self.target.host, self.target.port)
        return made

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class _Connection(asyncio.Protocol):
    """One request after the other; httptools reads the answers."""

    def __init__(self) -> None:
        import httptools

        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._done: asyncio.Future[tuple[int, dict[str, str], bytes]] | None = None
        self._transport: asyncio.Transport | None = None
        self.usable = False

    async def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; raises ConnectionError where the connection ends first."""
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._headers, self._body, self.usable = {}, [], False
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    # ------------------------------------------------------------------------------------------ told by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have an asyncio.Transport's methods and are none
        self._transport, self.usable = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionError("the endpoint closed the connection"))

    # --------------------------------------------------------------------------------------------- told by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self.usable = bool(self._parser.should_keep_alive())
        if self._done is not None and not self._done.done():
            self._done.set_result((self._parser.get_status_code(), self._headers, b"".join(self._body)))
