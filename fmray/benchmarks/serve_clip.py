"""The part `clip` of `fmray benchmark serve`: pictures a second beside the bare engine, Infinity and plain FastAPI.

Every repeat is a fixed number of requests, from idle to the last answer, so that ramp-up and the last, smaller batches count.
All sides take turns in one run on the same core.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from fmray.benchmarks.load import Load
from fmray.benchmarks.peers import Measured, Side
from fmray.benchmarks.serve_bench import ServeBench, data_urls
from fmray.benchmarks.serve_processes import bare_side, infinity_server, our_server, plain_server
from fmray.benchmarks.table import Row

EMBEDDINGS = "/v1/embeddings"
INFINITY_PATH, PLAIN_PATH = "/embeddings", "/embed"
SAME_DIRECTION = 0.99
"""Cosine of two servers' vectors of one picture: they resize it a little differently."""

Ways = dict[str, Callable[[], float]]


def clip(bench: ServeBench) -> list[Row]:
    """ViT-B/32 beside the bare engine and Infinity; the emoji CLIP beside plain FastAPI."""
    return _large(bench) + _small(bench)


def _large(bench: ServeBench) -> list[Row]:
    sizes, core = bench.sizes, bench.server_core
    count = sizes.clip_requests
    theirs, versions = infinity_server(bench.clip, bench.parity, core)
    bench.peer |= versions
    bodies = bench.embedding_bodies(bench.photos)
    shape = {"model": "served", "modality": "image", "encoding_format": "base64"}
    peer_bodies = [json.dumps({**shape, "input": [url]}).encode() for url in data_urls(bench.photos)]
    with ExitStack() as stack:
        ours = stack.enter_context(our_server(bench.clip, core))
        stack.enter_context(theirs)
        bare = stack.enter_context(bare_side())
        full = bare.ask("prepare", model=str(bench.clip), pictures=str(bench.photos), core=core)
        same = _alike(
            bench.closed(ours, EMBEDDINGS, bodies, len(bodies), keep=True),
            bench.closed(theirs, INFINITY_PATH, peer_bodies, len(bodies), keep=True),
        )
        bare.ask("batches", count=full)
        loads: list[Load] = []

        def through_ours() -> float:
            loads.append(bench.closed(ours, EMBEDDINGS, bodies, count))
            return loads[-1].rate

        found = _in_turn(
            sizes.repeats,
            {
                "bare": lambda: float(bare.ask("batches", count=count)),
                "ours": through_ours,
                "infinity": lambda: bench.closed(theirs, INFINITY_PATH, peer_bodies, count).rate,
            },
        )
    what = f"{bench.names['clip']}, fp32, {sizes.clients} clients, JPEG photos"
    bench.notes.append(_cost(what, loads))
    mine = found["ours"].shown("images/s")
    return [
        Row(
            f"{what}: smallest cosine of both servers' vectors",
            f"{same:.4f}",
            "Infinity",
            same,
            SAME_DIRECTION,
        ),
        Row(
            f"{what}: over the bare engine on full batches of {full}",
            mine,
            found["bare"].shown("images/s"),
            found["ours"].median / found["bare"].median,
            0.85,
        ),
        Row(
            f"{what}: over Infinity",
            mine,
            found["infinity"].shown("images/s"),
            found["ours"].median / found["infinity"].median,
            1.1,
        ),
    ]


def _small(bench: ServeBench) -> list[Row]:
    sizes, core = bench.sizes, bench.server_core
    count = sizes.emoji_requests
    bodies = bench.embedding_bodies(bench.drawings)
    plain_bodies = [json.dumps({"input": url}).encode() for url in data_urls(bench.drawings)]
    with ExitStack() as stack:
        ours = stack.enter_context(our_server(bench.emoji, core))
        plain = stack.enter_context(plain_server(bench.plain_emoji, core))
        bare: Side = stack.enter_context(bare_side())
        full = bare.ask("prepare", model=str(bench.emoji), pictures=str(bench.drawings), core=core)
        bench.closed(ours, EMBEDDINGS, bodies, 2 * sizes.clients)
        bench.closed(plain, PLAIN_PATH, plain_bodies, 2 * sizes.clients)
        bare.ask("batches", count=full)
        loads: list[Load] = []

        def through_ours() -> float:
            loads.append(bench.closed(ours, EMBEDDINGS, bodies, count))
            return loads[-1].rate

        found = _in_turn(
            sizes.repeats,
            {
                "bare": lambda: float(bare.ask("batches", count=count)),
                "ours": through_ours,
                "plain": lambda: bench.closed(plain, PLAIN_PATH, plain_bodies, count // 2).rate,
            },
        )
    what = f"{bench.names['emoji']}, fp32, {sizes.clients} clients, PNG drawings"
    bench.notes.append(_cost(what, loads))
    mine = found["ours"].shown("images/s")
    return [
        Row(
            f"{what}: over plain FastAPI + transformers",
            mine,
            found["plain"].shown("images/s"),
            found["ours"].median / found["plain"].median,
            3.0,
        ),
        Row(
            f"{what}: over the bare engine on full batches of {full}",
            mine,
            found["bare"].shown("images/s"),
            found["ours"].median / found["bare"].median,
        ),
    ]


def _in_turn(repeats: int, ways: Ways) -> dict[str, Measured]:
    """Each way's figures, the ways taking turns (A B C A B C …)."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
    return {name: Measured(tuple(values)) for name, values in found.items()}


def _cost(what: str, loads: list[Load]) -> str:
    cost = 1e6 * sum(load.cpu_seconds for load in loads) / sum(len(load.shots) for load in loads)
    return (
        f"{what}: ours {loads[-1].shown}; the load generator takes {cost:.0f} µs of its own core a request."
    )


def _alike(ours: Load, theirs: Load) -> float:
    """The smallest cosine of two servers' vectors of the same picture."""
    mine, others = ({shot.number: _vector(shot.body) for shot in load.shots} for load in (ours, theirs))
    return min(float(mine[number] @ others[number]) for number in mine)


def _vector(body: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    vector = np.frombuffer(base64.b64decode(json.loads(body)["data"][0]["embedding"]), np.float32)
    return vector / np.linalg.norm(vector)
