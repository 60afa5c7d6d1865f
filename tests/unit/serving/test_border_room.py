"""Too many requests at once: what has no room is refused at the border, before it costs anything, and those inside go on."""

from __future__ import annotations

import threading
import time

import httpx
import pytest

from tests.unit.serving.border_app import border_app, running, until


def test_what_has_no_room_is_refused_at_once_and_those_inside_are_answered() -> None:
    app, seen = border_app(most_inside=2)
    answers: list[int] = []
    with running(app) as port:
        url = f"http://127.0.0.1:{port}"

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/slow", json={"number": 1.0}, timeout=10).status_code)

        inside = [threading.Thread(target=ask) for _ in range(2)]
        for thread in inside:
            thread.start()
        time.sleep(0.3)
        began = time.monotonic()
        refused = httpx.post(f"{url}/v1/slow", json={"number": 1.0}, timeout=10)
        assert time.monotonic() - began < 0.5
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert refused.json()["error"]["message"] == (
            "2 requests are being answered and no more may wait; try again later"
        )
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(f"{url}/health").status_code == 200  # what only asks how it goes is never refused
        for thread in inside:
            thread.join()
        assert answers == [200, 200]
        assert until(lambda: seen.finished == 2)
        assert httpx.post(f"{url}/v1/slow", json={"number": 0.0}).status_code == 200  # the room is free again


def test_a_request_whose_client_leaves_gives_its_room_back() -> None:
    app, seen = border_app(most_inside=1)
    with running(app) as port:
        url = f"http://127.0.0.1:{port}"
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{url}/v1/slow", json={"number": 30.0}, timeout=0.3)
        assert until(lambda: seen.cancelled == 1)
        assert httpx.post(f"{url}/v1/slow", json={"number": 0.0}, timeout=10).status_code == 200


def test_a_slow_body_takes_no_room() -> None:
    app, _ = border_app(most_inside=1, body_seconds=5.0)
    with running(app) as port:
        url = f"http://127.0.0.1:{port}"

        def slowly() -> object:
            yield b'{"number"'
            time.sleep(1.0)
            yield b": 0}"

        late: list[int] = []
        headers = {"content-type": "application/json"}
        thread = threading.Thread(
            target=lambda: late.append(
                httpx.post(f"{url}/v1/slow", content=slowly(), headers=headers).status_code
            )
        )
        thread.start()
        time.sleep(0.2)
        assert httpx.post(f"{url}/v1/slow", json={"number": 0.0}).status_code == 200
        thread.join()
        assert late == [200]
