"""Where pictures may be fetched from: listed hosts, public addresses, the address that was judged, proven by TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Coroutine, Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest

from fmray.config.serving import FetchConfig
from fmray.errors import RequestError
from fmray.serving.fetch import Fetcher
from fmray.serving.fetch_addresses import is_public
from tests.unit.serving.test_fetch import BROKEN, HERE, LATE, MOST, NAME, PICTURE, fetched, fetcher, refused
from tests.web_host import certified, moved, reply, web_host


def never(_host: str, _port: int) -> Coroutine[None, None, Sequence[str]]:
    raise AssertionError("a host that is not listed was looked up")


CURE = "send data:image/png;base64,…, or have"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://0.0.0.0/",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/",
        "http://example.org.evil.test/",
        "http://example.org:22/",
    ],
)
def test_what_is_not_listed_is_not_looked_up(url: str) -> None:
    config = FetchConfig(hosts=("example.org",))
    host, port = url.split("/")[2].partition(":")[::2]
    facts = (
        f"no pictures are fetched from {host} port {port or 80}; {CURE} it listed in the server's fetch.hosts"
    )
    work = Fetcher(config, MOST, resolve=never, is_allowed=lambda _: True).fetch(url, "input[3]")
    refused(lambda: asyncio.run(work), "url_not_allowed", facts)


def test_nothing_is_fetched_unless_hosts_are_listed() -> None:
    off = Fetcher(FetchConfig(), MOST, resolve=never)
    facts = f"pictures are not fetched by address here; {CURE} the server's fetch.hosts list the host"
    refused(lambda: asyncio.run(off.fetch("https://example.org/", "input[3]")), "url_not_allowed", facts)
    urls = {"input[3]": "https://example.org/", "input[4]": "file:///etc/passwd"}
    refused(lambda: asyncio.run(off.resolve_urls(urls, max_bytes=9)), "url_not_allowed", facts)


@pytest.mark.parametrize(
    "numbers",
    [
        HERE,
        ["10.1.2.3"],
        ["169.254.169.254"],
        ["::1"],
        ["fd00:ec2::254"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["2002:7f00:1::"],
        ["fe80::1%lo"],
        ["8.8.8.8", "127.0.0.1"],
        ["2606:4700::1111", "8.8.8.8", "10.0.0.1"],
    ],
)
def test_a_listed_host_at_an_address_inside_is_refused(numbers: list[str]) -> None:
    """One such address among public ones is enough; nothing is connected to, and no address is told."""
    asked: list[str] = []

    async def resolve(host: str, _port: int) -> Sequence[str]:
        asked.append(host)
        return numbers

    async def scenario() -> bytes:
        async with web_host({"/": reply(PICTURE)}) as host:
            try:
                work = fetcher(host.port, resolve=resolve, is_allowed=is_public)
                return await work.fetch(f"http://{NAME}:{host.port}/", "input[3]")
            finally:
                assert not host.heads

    refused(lambda: asyncio.run(scenario()), "url_not_allowed", f"{NAME} is not a public host")
    assert asked == [NAME]


def test_the_systems_resolver_and_the_real_rule_keep_this_machine_out() -> None:
    work = Fetcher(FetchConfig(hosts=("localhost",)), MOST).fetch("http://localhost/", "input[3]")
    refused(lambda: asyncio.run(work), "url_not_allowed", "localhost is not a public host")


def test_a_name_that_changes_its_mind_is_asked_once() -> None:
    """DNS rebinding: the first answer is judged and connected to; a second one, asked for by a redirect, is judged too."""
    answers = iter([HERE, ["127.0.0.2"], ["10.0.0.1"]])
    asked: list[str] = []

    async def resolve(host: str, _port: int) -> Sequence[str]:
        asked.append(host)
        return next(answers)

    async def scenario() -> None:
        async with web_host({"/": reply(PICTURE), "/moved": moved("/")}) as host:
            one = fetcher(
                host.port, resolve=resolve, is_allowed=lambda number: number == ip_address("127.0.0.1")
            )
            assert await one.fetch(f"http://{NAME}:{host.port}/", "x") == PICTURE
            assert asked == [NAME]
            with pytest.raises(RequestError, match=f"{NAME} is not a public host"):
                await one.fetch(f"http://{NAME}:{host.port}/moved", "x")
            assert len(host.heads) == 1

    asyncio.run(scenario())


def test_dead_addresses_and_names() -> None:
    async def none(_host: str, _port: int) -> Sequence[str]:
        raise socket.gaierror(-2, "Name or service not known")

    refused(lambda: fetched({}, resolve=none), "url_unreachable", BROKEN)

    async def empty(_host: str, _port: int) -> Sequence[str]:
        return []

    refused(lambda: fetched({}, resolve=empty), "url_unreachable", BROKEN)

    async def hangs(_host: str, _port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return HERE

    refused(lambda: fetched({}, resolve=hangs, connect_seconds=0.3), "url_unreachable", LATE)

    async def second(_host: str, _port: int) -> Sequence[str]:
        return ["127.0.0.9", *HERE]  # nobody listens at the first

    assert fetched({"/": reply(PICTURE)}, resolve=second) == PICTURE
    refused(lambda: asyncio.run(fetcher(9).fetch(f"http://{NAME}:9/", "input[3]")), "url_unreachable", BROKEN)


def test_a_host_that_has_ipv6_alone() -> None:
    async def resolve(_host: str, _port: int) -> Sequence[str]:
        return ["::1"]

    async def scenario() -> bytes:
        async with web_host({"/": reply(PICTURE)}, address="::1") as host:
            return await fetcher(host.port, resolve=resolve).fetch(f"http://{NAME}:{host.port}/", "x")

    assert asyncio.run(scenario()) == PICTURE


# ------------------------------------------------------------------------------------------------------------- TLS


def over_tls(
    folder: Path, certified_name: str, url: str = "https://{}:{}/", *, believed: bool = True
) -> list[str | None]:
    """Fetches the picture over TLS; the names that the client has asked for."""
    server, client = certified(folder, certified_name)

    async def scenario() -> list[str | None]:
        answers = {"/": reply(PICTURE), "/down": moved(f"http://{NAME}/")}
        async with web_host(answers, tls=server) as host:
            tls = client if believed else ssl.create_default_context()
            one = fetcher(host.port, NAME, tls=tls, connect_seconds=20, total_seconds=20)
            assert await one.fetch(url.format(NAME, host.port), "input[3]") == PICTURE
            return host.server_names

    return asyncio.run(scenario())


def test_tls_to_the_pinned_address_under_the_hosts_name(tmp_path: Path) -> None:
    assert over_tls(tmp_path, NAME) == [NAME]


def test_tls_that_proves_nothing_is_refused(tmp_path: Path) -> None:
    refused(lambda: over_tls(tmp_path, "other.test"), "url_unreachable", BROKEN)
    refused(lambda: over_tls(tmp_path, NAME, believed=False), "url_unreachable", BROKEN)
    refused(lambda: over_tls(tmp_path, NAME, "http://{}:{}/"), "url_unreachable", BROKEN)
    refused(
        lambda: over_tls(tmp_path, NAME, "https://{}:{}/down"),
        "url_not_allowed",
        "a redirect leads from https to http",
    )
