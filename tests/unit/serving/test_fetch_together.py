"""The pictures of a request, fetched together: names, limits, the first failure, a client that leaves."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from fmray.errors import RequestError
from tests.unit.serving.test_fetch import NAME, PICTURE, fetcher, reply, silence, until
from tests.web_host import Answer, WebHost, web_host


def run(
    answers: dict[str, Answer], urls: dict[str, str], max_bytes: int = 10**6, **options: Any
) -> tuple[Any, WebHost]:
    """Result or RequestError, and what the host saw. `{}` in an address is the host."""

    async def scenario() -> tuple[Any, WebHost]:
        async with web_host(answers) as host:
            one = fetcher(host.port, **options)
            full = {name: url.format(f"http://{NAME}:{host.port}") for name, url in urls.items()}
            try:
                found: Any = await one.resolve_urls(full, max_bytes=max_bytes)
            except RequestError as error:
                found = error
            await until(lambda: host.open == 0)
            one.close()
            return found, host

    return asyncio.run(scenario())


def test_pictures_by_their_names_each_address_once() -> None:
    answers: dict[str, Answer] = {"/a": reply(PICTURE), "/b": reply(b"b")}
    urls = {"input[0]": "{}/a", "input[2]": "{}/b", "input[5]": "{}/a"}
    found, host = run(answers, urls)
    assert found == {"input[0]": PICTURE, "input[2]": b"b", "input[5]": PICTURE}
    assert list(found) == list(urls)
    assert len(host.heads) == 2
    assert run({}, {})[0] == {}


def test_the_first_failure_ends_the_others() -> None:
    answers: dict[str, Answer] = {"/slow": silence, "/bad": reply(b"", "404 -")}
    start = time.monotonic()
    error, host = run(answers, {"a": "{}/slow", "b": "{}/bad", "c": "{}/slow"}, total_seconds=60)
    assert (error.status, error.code, error.param) == (400, "url_unreachable", "b")
    assert time.monotonic() - start < 20
    assert host.left_early >= 1


def test_an_address_that_fails_under_two_names_is_called_by_the_first() -> None:
    error, _ = run({"/bad": reply(b"", "404 -")}, {"a": "{}/bad", "b": "{}/bad"})
    assert (error.param, error.message) == ("a", "a: the host answered 404 instead of 200")


def test_of_several_refusals_the_first_item_is_named() -> None:
    urls = {"input[1]": "file:///a", "input[0]": "ftp://b", "input[2]": "http://user@c/"}
    for _ in range(5):
        error, _ = run({}, urls)
        assert (error.code, error.param) == ("url_not_allowed", "input[1]")


def test_limits_of_a_request() -> None:
    answers: dict[str, Answer] = {f"/{place}": reply(PICTURE) for place in range(5)}
    urls = {f"input[{place}]": f"{{}}/{place}" for place in range(5)}
    error, host = run(answers, urls, per_request=4)
    assert (error.status, error.code, error.param) == (400, "too_many_inputs", "input[4]")
    line = "input[4]: at most 4 pictures of a request are fetched; send the others as data: URLs"
    assert (error.message, host.heads) == (line, [])
    assert len(run(answers, urls, 5 * len(PICTURE), per_request=5)[0]) == 5
    error, _ = run(answers, urls, 5 * len(PICTURE) - 1)
    assert (error.status, error.code, error.param) == (413, "request_too_large", None)
    error, _ = run(answers, {"a": "{}/0"}, 2**20, most=100)
    assert error.message == "a: the picture has more than 100 bytes"
    error, _ = run(answers, urls, 2**20 // 512)
    assert error.message == "the pictures to fetch have together more than 2,048 bytes"


def test_few_at_once_and_all_in_the_end() -> None:
    async def unhurried(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write(reply(PICTURE))

    answers: dict[str, Answer] = {f"/{place}": unhurried for place in range(9)}
    found, host = run(
        answers, {str(place): f"{{}}/{place}" for place in range(9)}, at_once=2, total_seconds=60
    )
    assert list(found.values()) == [PICTURE] * 9
    assert host.most_open <= 2


def test_waiting_for_a_turn_is_within_the_seconds() -> None:
    error, host = run(
        {"/1": silence, "/2": silence}, {"a": "{}/1", "b": "{}/2"}, at_once=1, total_seconds=0.5
    )
    assert (error.code, error.message[1:]) == ("url_unreachable", ": the host did not answer in time")
    assert len(host.heads) <= 1


def test_a_client_that_leaves_takes_its_fetches_along() -> None:
    async def scenario() -> None:
        async with web_host({"/1": silence, "/2": silence, "/": reply(PICTURE)}) as host:
            outcomes: list[str] = []
            one = fetcher(host.port, at_once=2, total_seconds=60, count=outcomes.append)
            base = f"http://{NAME}:{host.port}"
            task = asyncio.create_task(one.resolve_urls({"a": f"{base}/1", "b": f"{base}/2"}, max_bytes=99))
            await until(lambda: host.open == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: host.open == 0)
            assert await one.fetch(f"{base}/", "x") == PICTURE  # their turns are free again
            with pytest.raises(RequestError):
                await one.fetch("http://elsewhere.test/", "x")
            assert outcomes == ["cancelled", "cancelled", "ok", "url_not_allowed"]

    asyncio.run(scenario())
