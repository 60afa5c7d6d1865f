"""Pictures by web address: from listed hosts at public addresses, within seconds and bytes, and nothing else on the way.

HTTP/1.1 by h11, which uvicorn brings, over asyncio's streams: one GET per connection. So there is no proxy from the
environment, no cookie, no decompression and no pool to switch off, and the address that was judged is the one that is
connected to: the name is resolved once (no rebinding), and stands in SNI and `Host` alone.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

import h11

from fmray.config.serving import FetchConfig
from fmray.errors import RequestError
from fmray.serving.fetch_addresses import (
    HostList,
    IPAddress,
    WebAddress,
    is_public,
    not_allowed,
    read_address,
)
from fmray.serving.picture_cost import size_in_words, too_many_bytes

REDIRECTS = {301, 302, 303, 307, 308}
MOST_TRIED = 3
"""Addresses of one host that are connected to, one after the other; they share `connect_seconds`."""
MOST_HEAD_BYTES = 32_768
"""Status line and headers of an answer."""
READ_BYTES = 65_536

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port to IP addresses as texts; raises OSError where there are none."""


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


@dataclass(slots=True)
class _Allowance:
    """Bytes that one picture, or all pictures of one request, may still have."""

    left: int
    refusal: RequestError

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise self.refusal


class Fetcher:
    """Fetches pictures; one per process, on one event loop. `Fetcher(config.fetch, max_bytes=10 * 2**20)`

    `resolve`, `is_allowed` and `tls` are the system's resolver, global unicast and the system's certificates unless a
    test says otherwise. `count` is called with the outcome of every fetch: `ok` or the error's code.
    """

    def __init__(
        self,
        config: FetchConfig,
        max_bytes: int,
        *,
        resolve: Resolve | None = None,
        is_allowed: Callable[[IPAddress], bool] = is_public,
        tls: ssl.SSLContext | None = None,
        count: Callable[[str], None] | None = None,
    ) -> None:
        self._config, self._max_bytes = config, max_bytes
        self._hosts = HostList(config.hosts)
        self._threads = ThreadPoolExecutor(config.at_once, thread_name_prefix="resolve")
        self._resolve = resolve or self._ask_system
        self._is_allowed = is_allowed
        self._tls = tls or ssl.create_default_context()
        self._count = count
        self._slots = asyncio.Semaphore(config.at_once)

    def close(self) -> None:
        """Ends the resolver's threads; fetches that run are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def resolve_urls(self, urls: Mapping[str, str], *, max_bytes: int) -> dict[str, bytes]:
        """The pictures of one request by their names: `{"input[3]": "https://…"}` to `{"input[3]": b"\\x89PNG…"}`.

        Together; an address that stands there twice is fetched once. The first that fails ends the others, and so does the
        caller's cancellation. Raises RequestError(400) as `fetch`, for more than `per_request` addresses, and
        RequestError(413) where all together have more than `max_bytes`.
        """
        first: dict[str, str] = {}
        for name, url in urls.items():
            first.setdefault(url, name)
            if self._hosts and len(first) > self._config.per_request:
                message = f"{name}: at most {self._config.per_request} pictures of a request are fetched"
                raise RequestError(400, "too_many_inputs", f"{message}; send the others as data: URLs", name)
        message = f"the pictures to fetch have together more than {size_in_words(max_bytes)}"
        refusal = RequestError(413, "request_too_large", message)
        together = _Allowance(max_bytes, refusal)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    url: group.create_task(self._counted(url, name, together)) for url, name in first.items()
                }
        except* RequestError as failed:
            errors = [error for error in failed.exceptions if isinstance(error, RequestError)]
        else:
            return {name: tasks[url].result() for name, url in urls.items()}
        places = {name: place for place, name in enumerate(urls)}
        raise min(errors, key=lambda error: places.get(error.param or "", -1))  # the same one each time

    async def fetch(self, url: str, name: str) -> bytes:
        """One picture's bytes, whatever they are.

        Raises RequestError(400) with `param=name`: `url_not_allowed` for a host that is not listed, an address that is
        not public, a doubtful spelling; `url_unreachable` where the host does not answer 200 in time and uncompressed;
        `image_too_large`. No message holds an IP address or a word of the host's answer.
        """
        return await self._counted(url, name, None)

    async def _counted(self, url: str, name: str, together: _Allowance | None) -> bytes:
        outcome = "cancelled"
        try:
            data = await self._within_time(url, name, together)
            outcome = "ok"
            return data
        except RequestError as error:
            outcome = error.code
            raise
        finally:
            if self._count is not None:
                self._count(outcome)

    async def _within_time(self, url: str, name: str, together: _Allowance | None) -> bytes:
        """Where everything that networks raise becomes an answer."""
        if not self._hosts:
            cure = "send data:image/png;base64,…, or have the server's fetch.hosts list the host"
            raise not_allowed(name, f"pictures are not fetched by address here; {cure}")
        address = self._listed(read_address(url, name), name)
        try:
            async with asyncio.timeout(self._config.total_seconds), self._slots:
                return await self._follow(address, name, together)
        except TimeoutError:
            raise _unreachable(name, "the host did not answer in time") from None
        except (OSError, h11.ProtocolError):
            raise _unreachable(name, "the host cannot be reached, or its answer cannot be read") from None

    async def _follow(self, address: WebAddress, name: str, together: _Allowance | None) -> bytes:
        for _ in range(self._config.redirects + 1):
            answer = await self._get(address, name, together)
            if isinstance(answer, bytes):
                return answer
            address = self._redirected(address, answer, name)
        raise _unreachable(name, f"more than {self._config.redirects} redirects")

    def _redirected(self, address: WebAddress, redirect: _Redirect, name: str) -> WebAddress:
        """Checked as the first was; its host is not told, as only the redirecting one knows it."""
        try:
            target = self._listed(read_address(address.joined(redirect.location), name), name)
        except (RequestError, ValueError):
            raise not_allowed(name, "a redirect leads where pictures are not fetched from") from None
        if address.scheme == "https" and target.scheme == "http":
            raise not_allowed(name, "a redirect leads from https to http")
        return target

    def _listed(self, address: WebAddress, name: str) -> WebAddress:
        if not self._hosts.allows(address):
            cure = "send data:image/png;base64,…, or have it listed in the server's fetch.hosts"
            raise not_allowed(
                name, f"no pictures are fetched from {address.host} port {address.port}; {cure}"
            )
        return address

    async def _get(self, address: WebAddress, name: str, together: _Allowance | None) -> bytes | _Redirect:
        async with asyncio.timeout(self._config.connect_seconds):
            reader, writer = await self._connect(address, name)
        try:
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MOST_HEAD_BYTES)
            headers = {
                "Host": address.host_header,
                "User-Agent": "fmray",
                "Accept": "image/jpeg, image/png, image/webp, image/gif, image/bmp",
                "Accept-Encoding": "identity",
                "Connection": "close",
            }
            request = h11.Request(method="GET", target=address.target, headers=list(headers.items()))
            writer.write(connection.send(request) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            await writer.drain()
            return await self._receive(reader, connection, name, together)
        finally:
            writer.transport.abort()  # a host that keeps its end open is not waited for

    async def _connect(
        self, address: WebAddress, name: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        texts = await self._resolve(address.host, address.port)
        found = [ip_address(text) for text in texts]
        if not all(map(self._is_allowed, found)):
            raise not_allowed(name, f"{address.host} is not a public host")
        tried = found[:MOST_TRIED]
        encrypted = address.scheme == "https"
        failure: OSError = OSError("no address")
        for pinned in tried:
            try:
                async with asyncio.timeout(self._config.connect_seconds / len(tried)):
                    return await asyncio.open_connection(
                        str(pinned),
                        address.port,
                        ssl=self._tls if encrypted else None,
                        server_hostname=address.host if encrypted else None,
                    )
            except OSError as error:  # TimeoutError is one
                failure = error
        raise failure

    async def _ask_system(self, host: str, port: int) -> list[str]:
        """In threads of our own: a resolver that hangs holds up no other work of the loop."""
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    async def _receive(
        self, reader: asyncio.StreamReader, connection: h11.Connection, name: str, together: _Allowance | None
    ) -> bytes | _Redirect:
        """Body of a plain 200, or where a redirect leads. Every byte is counted, those of the wrapping too."""
        own = _Allowance(self._max_bytes, too_many_bytes(name, self._max_bytes))
        wire = _Allowance(
            2 * self._max_bytes + 2 * READ_BYTES, _unreachable(name, "the host answers without end")
        )
        pieces = _Allowance(
            max(1000, self._max_bytes // 512), _unreachable(name, "the host answers in crumbs")
        )
        body: list[bytes] = []
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                block = await reader.read(READ_BYTES)
                wire.spend(len(block))
                connection.receive_data(block)
            elif isinstance(event, h11.Response):
                location = _judge(event, name, [own] if together is None else [own, together])
                if location is not None:
                    return _Redirect(location)
            elif isinstance(event, h11.Data):
                for allowance in (own, together):
                    if allowance is not None:
                        allowance.spend(len(event.data))
                pieces.spend(1)
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                return b"".join(body)
            elif isinstance(event, h11.InformationalResponse):
                pieces.spend(1)
            else:
                raise _unreachable(name, "the host ended its answer early")


def _judge(answer: h11.Response, name: str, allowances: Sequence[_Allowance]) -> str | None:
    """None where the picture follows, a text where it is elsewhere; raises RequestError for all else."""
    headers = [(bytes(key), bytes(value)) for key, value in answer.headers]
    if answer.status_code in REDIRECTS:
        for key, value in headers:
            if key == b"location":
                return value.decode("utf-8", "replace")
    if answer.status_code != 200:
        raise _unreachable(name, f"the host answered {answer.status_code} instead of 200")
    for key, value in headers:
        if key == b"content-encoding" and value.strip().lower() != b"identity":
            raise _unreachable(name, "the host sends the picture compressed, which is not read")
        if key == b"content-length":
            for allowance in allowances:
                if int(value) > allowance.left:
                    raise allowance.refusal
    return None


def _unreachable(name: str, facts: str) -> RequestError:
    return RequestError(400, "url_unreachable", f"{name}: {facts}", name)
