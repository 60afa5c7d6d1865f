"""Several models behind one address, replaced while requests run; ready means that a model answers, busy or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fmray.config.serving import ServeConfig
from fmray.errors import CheckpointError, ConfigError, RequestError
from fmray.serving.asks import TextAsk
from fmray.serving.opening import Endpoint, open_engine
from fmray.serving.shelf import PROBE_SECONDS
from tests.endpoint import another_checkpoint


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scene()

    asyncio.run(bounded())


def client_of(endpoint: Endpoint) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(endpoint.app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30)


async def embedded(client: httpx.AsyncClient, model: str = "m") -> Any:
    reply = await client.post("/v1/embeddings", json={"model": model, "input": "red"})
    return reply.json()["data"][0]["embedding"] if reply.status_code == 200 else reply.json()["error"]["code"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another CLIP of the same shape."""
    return another_checkpoint(tmp_path_factory.mktemp("other"))


def test_models_of_both_kinds_behind_one_address(
    checkpoint: str, vqa_checkpoint: str, mllm_checkpoint: str
) -> None:
    async def scene() -> None:
        endpoint = Endpoint(
            ServeConfig(checkpoint=checkpoint, more={"v": vqa_checkpoint, "talk": mllm_checkpoint})
        )
        async with client_of(endpoint) as client:
            listed = (await client.get("/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == ["fmray-clip", "v", "talk"]
            assert len(await embedded(client, "fmray-clip")) == 8
            body = {"model": "talk", "messages": [{"role": "user", "content": "is it big?"}]}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
            missing = (await client.post("/v1/chat/completions", json={**body, "model": "x"})).json()["error"]
            assert (
                missing["message"] == "the model 'x' is not served here; there is 'fmray-clip', 'v', 'talk'"
            )
            assert (await client.get("/ready")).json() == {
                "status": "ready",
                "models": ["fmray-clip", "v", "talk"],
            }
        endpoint.shelf.close()

    run(scene)


def test_a_new_checkpoint_takes_over_and_no_request_is_lost(checkpoint: str, other: str) -> None:
    async def scene() -> None:
        endpoint = Endpoint(ServeConfig(checkpoint=checkpoint, model_id="m"))
        async with client_of(endpoint) as client:
            before = await embedded(client)
            seen, going = [], True

            async def ask_on() -> None:
                while going:
                    seen.append(await embedded(client))

            asking = [asyncio.ensure_future(ask_on()) for _ in range(4)]
            for location in (other, checkpoint, other):
                await endpoint.reconfigure({"checkpoint": location})
                await asyncio.sleep(0.1)
            going = False
            await asyncio.gather(*asking)
            after = await embedded(client)
        assert distance(before, after) > 1e-2
        assert len(seen) > 20
        close = [min(distance(one, before), distance(one, after)) for one in seen]
        assert max(close) < 1e-5, "each is one model's answer or the other's"
        assert endpoint.config.checkpoint == other
        endpoint.shelf.close()

    run(scene)


def distance(one: Any, other: Any) -> float:
    assert isinstance(one, list), one
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_a_change_that_cannot_be_made_changes_nothing(checkpoint: str, tmp_path: Path) -> None:
    async def scene() -> None:
        endpoint = Endpoint(ServeConfig(checkpoint=checkpoint, model_id="m"))
        async with client_of(endpoint) as client:
            before = await embedded(client)
            for changes, error, line in (
                ({"checkpoint": str(tmp_path)}, CheckpointError, str(tmp_path)),
                ({"port": 9}, ConfigError, "user_config.port=9: an endpoint that runs can change checkpoint"),
                ({"batch": {"max_items": 0}}, ValueError, "max_items"),
            ):
                with pytest.raises(error, match=line):
                    await endpoint.reconfigure(changes)
                assert await embedded(client) == before
            await endpoint.reconfigure({"more": {"second": checkpoint}})
            assert await embedded(client, "second") == before
            await endpoint.reconfigure({"more": {}})
            assert await embedded(client, "second") == "model_not_found"
            assert await embedded(client) == before
        endpoint.shelf.close()

    run(scene)


def test_ready_is_a_model_that_answers(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmray.serving.shelf.PROBE_SECONDS", 0.3)
    assert PROBE_SECONDS > 0.3

    async def scene() -> None:
        endpoint = Endpoint(ServeConfig(checkpoint=checkpoint, model_id="m"))
        (model,) = endpoint.shelf.models
        engine: Any = model.answers.engine
        async with client_of(endpoint) as client:
            assert (await client.get("/ready")).status_code == 200
            forward = engine.forward
            engine.forward = lambda batch: [RequestError(500, "model_failed", "no number")]
            reply = await client.get("/ready")
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
            assert "retry-after" in reply.headers
            assert b'fmray_ready{model="m"} 0.0' in (await client.get("/metrics")).content
            engine.forward = forward

            hanging = asyncio.Event()
            loop = asyncio.get_running_loop()

            def hang(batch: Any) -> Any:
                asyncio.run_coroutine_threadsafe(hanging.wait(), loop).result(20)
                return forward(batch)

            await asyncio.sleep(0.4)  # what it has answered is long ago
            engine.forward = hang
            assert (await client.get("/ready")).status_code == 503, "a model that hangs is not ready"
            hanging.set()
            engine.forward = forward
            await asyncio.sleep(0.1)
            assert (await client.get("/ready")).status_code == 200

            async def slow_and_busy() -> None:
                batcher: Any = model.answers
                await batcher.answer([TextAsk("a", "")] * 400)

            def slowly(batch: Any) -> Any:
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result(5)
                return forward(batch)

            engine.forward = slowly
            busy = asyncio.ensure_future(slow_and_busy())
            await asyncio.sleep(0.2)
            assert (await client.get("/ready")).status_code == 200, "busy is not broken"
            busy.cancel()
        endpoint.shelf.close()

    run(scene)


def test_a_library_loads_what_is_asked_for_and_forgets_the_oldest(
    checkpoint: str, other: str, vqa_checkpoint: str, tmp_path: Path
) -> None:
    for name, place in (("one", checkpoint), ("two", other), ("three", checkpoint), ("v", vqa_checkpoint)):
        (tmp_path / name).symlink_to(place)
    (tmp_path / "broken").mkdir()
    (tmp_path.parent / "outside").mkdir(exist_ok=True)

    async def scene() -> None:
        endpoint = Endpoint(ServeConfig(checkpoint=checkpoint, model_id="m", library=str(tmp_path)))
        async with client_of(endpoint) as client:
            expected = await embedded(client)
            listed = (await client.get("/v1/models")).json()["data"]
            assert {model["id"]: model["fmray"] is None for model in listed} == {
                "m": False,
                **dict.fromkeys(("one", "two", "three", "v", "broken"), True),
            }
            many = await asyncio.gather(*(embedded(client, "one") for _ in range(8)))
            assert all(distance(each, expected) < 1e-6 for each in many)
            assert [model.id for model in endpoint.shelf.models] == ["m", "one"], "loaded once"
            assert distance(await embedded(client, "two"), expected) > 1e-3
            await embedded(client, "one")
            body = {"model": "v", "messages": [{"role": "user", "content": "x"}]}
            assert (
                await client.post("/v1/chat/completions", json=body)
            ).status_code == 400  # it has no picture
            assert [model.id for model in endpoint.shelf.models] == ["m", "one", "v"], (
                "two was asked for longest ago"
            )
            asking = [asyncio.ensure_future(embedded(client, name)) for name in ("one", "two", "three") * 6]
            for each, name in zip(await asyncio.gather(*asking), ("one", "two", "three") * 6, strict=True):
                assert (distance(each, expected) < 1e-6) == (name != "two"), (
                    "who is asked while it leaves answers"
                )
            for name, code in (
                ("broken", "model_broken"),
                ("../outside", "model_not_found"),
                ("..", "model_not_found"),
                ("one/../two", "model_not_found"),
                ("", "model_not_found"),
            ):
                assert await embedded(client, name) == code
        endpoint.shelf.close()

    run(scene)


def test_models_that_are_opened_at_the_same_time_keep_their_tied_weights(
    checkpoint: str, vqa_checkpoint: str, mllm_checkpoint: str
) -> None:
    """transformers patches itself while it loads; two at once would leave every later model without its output matrix."""
    config = ServeConfig(checkpoint=checkpoint)
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda place: open_engine(place, config), [vqa_checkpoint, mllm_checkpoint, checkpoint] * 4
            )
        )
    for place in (vqa_checkpoint, mllm_checkpoint):
        open_engine(place, config)
