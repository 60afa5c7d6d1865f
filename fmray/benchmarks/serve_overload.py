"""The part `overload` of `fmray benchmark serve`: more requests than can be answered, and how soon afterwards all is well."""

from __future__ import annotations

import time

from fmray.benchmarks.load import Load, Target, median_of, open_loop
from fmray.benchmarks.serve_bench import ServeBench
from fmray.benchmarks.serve_clip import EMBEDDINGS
from fmray.benchmarks.serve_processes import Server, our_server
from fmray.benchmarks.table import Row
from fmray.errors import ResourceError

DESIGNED = (200, 429)
WITH_HEADERS = (429, 503, 504)
"""Statuses that must tell a client when to come back."""
GROWTH_MIB = 512.0
"""Most memory that the server may take more than before: the queue's own bound (`batch.queue_mib`)."""
RECENT = 9
"""Lone requests whose median says whether the endpoint is as fast as before."""


def overload(bench: ServeBench) -> list[Row]:
    """The emoji CLIP at three times what it can do: statuses, memory, the time until a lone request is as fast as before."""
    sizes = bench.sizes
    bodies = bench.embedding_bodies(bench.drawings)
    with our_server(bench.emoji, bench.server_core) as server:
        bench.closed(server, EMBEDDINGS, bodies, 4 * sizes.clients)
        capacity = bench.closed(server, EMBEDDINGS, bodies, sizes.emoji_requests).rate
        calm = bench.closed(server, EMBEDDINGS, bodies, sizes.singles, 1).percentile(0.5)
        before = server.resident_mib
        load = open_loop(
            Target(server.port, EMBEDDINGS),
            bodies,
            rate=sizes.overload * capacity,
            seconds=sizes.overload_seconds,
            connections=4096,
        )
        recovered = _until_calm(bench, server, bodies, calm, sizes.overload_seconds - load.seconds)
        after, peak = server.resident_mib, server.peak_mib
        if not server.alive:
            raise ResourceError("the server ended under overload")
    others = sum(count for status, count in load.statuses.items() if status not in DESIGNED)
    silent = sum(shot.status in WITH_HEADERS and "retry-after" not in shot.headers for shot in load.shots)
    offered = len(load.shots) / sizes.overload_seconds
    what = f"{bench.names['emoji']}, {offered:.0f} requests/s for {sizes.overload_seconds:g} s"
    bench.notes.append(
        f"overload: answered {load.counted}; of the 200s {load.shown}, of the refusals p50 {_refused(load):.3g} ms, from when "
        f"they were due; the last answer {load.seconds:.1f} s after the start; the load generator took {1e6 * load.cost:.0f} µs "
        "a request."
    )
    bench.notes.append(
        f"overload: the server held {before:.0f} MiB before, {peak:.0f} at most, {after:.0f} afterwards; a lone request took "
        f"{1000 * calm:.3g} ms before."
    )
    return [
        Row(f"{what}: answers that are neither 200 nor 429", str(others), load.counted, others, 0, "lower"),
        Row(f"{what}: refusals that do not say when to come back", str(silent), "", silent, 0, "lower"),
        Row(
            f"{what}: answers/s of what it can do",
            f"{load.rate:.4g} images/s",
            f"{capacity:.4g} images/s",
            load.rate / capacity,
        ),
        Row(
            f"{what}: MiB more than before, at most",
            f"{peak:.0f} MiB",
            f"{before:.0f} MiB",
            peak - before,
            GROWTH_MIB,
            "lower",
        ),
        Row(
            f"{what}: seconds from the last arrival until a lone request is as fast as before",
            f"{recovered:.2f} s",
            "",
            recovered,
            sizes.recovery_seconds,
            "lower",
        ),
    ]


def _until_calm(bench: ServeBench, server: Server, bodies: list[bytes], calm: float, already: float) -> float:
    """Seconds since the last request was due until lone requests take at most half as long again as before, at the median.

    already: seconds less than nothing by which the last answer came after the last arrival.
    """
    began, target = time.perf_counter(), Target(server.port, EMBEDDINGS)
    waited = max(0.0, -already)
    while (now := time.perf_counter() - began) < 60:
        taken = [bench.closed(server, target.path, bodies, 1, 1).shots[0].seconds for _ in range(RECENT)]
        if median_of(taken) <= 1.5 * calm + 0.002:
            return waited + now
    return float("inf")


def _refused(load: Load) -> float:
    return 1000 * median_of([shot.seconds for shot in load.shots if shot.status == 429])
