"""The Ray Data door: numbered parts read by tasks wherever there is a CPU, then worked on by actors that hold a model.

Imports ray; knows no room. Blocks flow from one to the other as they are done; Ray Data holds the readers back where the actors
are slower, restarts an actor that dies and gives what it had to another.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import ray
import ray.data

from fmray.config.base import RuntimeConfig
from fmray.errors import FmrayError
from fmray.runtime.ray_cluster import connected, require_resources

Source = TypeVar("Source")
READER_CPUS = 1.0
QUIET = ("ray.data._internal.execution.streaming_executor", "ray.data._internal.progress")
"""Loggers that say when a data set starts, ends, and that Ray's own bars are off: ours is the one that people watch."""


def mapped_on_ray(
    parts: Sequence[int],
    read: Callable[[Source, int], bytes],
    source: Source,
    build: Callable[[], Callable[[bytes], bytes]],
    runtime: RuntimeConfig,
) -> Iterator[tuple[int, bytes]]:
    """`part, build()(read(source, part))` for each part, in the order in which they are done.

    `source` is sent once to each process that reads, `build` called once in each of `runtime.workers` actors (`[min, max]`: as
    many as keep up). Raises what `read` or an actor raised of our own errors; ResourceError where the cluster is too small.
    """
    with connected(runtime.address):
        low = min(runtime.worker_counts)
        wanted = {"CPU": low * runtime.cpus_per_worker + READER_CPUS}
        if runtime.gpus_per_worker:
            wanted["GPU"] = low * runtime.gpus_per_worker
        what = f"runtime.workers={low} and a task that decodes"
        require_resources(
            wanted, what, "lower runtime.workers, runtime.cpus_per_worker or runtime.gpus_per_worker"
        )
        sent = ray.put(source)

        def read_row(row: dict[str, Any]) -> dict[str, Any]:
            return _told(row["part"], lambda: read(_fetched(sent), row["part"]))

        rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        rows.context.enable_progress_bars = False
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        rows = rows.map(read_row, num_cpus=READER_CPUS)
        rows = rows.map(
            _Worker,
            fn_constructor_args=(build,),
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=max(runtime.worker_counts)),
            num_cpus=runtime.cpus_per_worker,
            num_gpus=runtime.gpus_per_worker or None,
        )
        for row in rows.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            yield int(row["part"]), row["content"]


def _told(part: int, work: Callable[[], bytes]) -> dict[str, Any]:
    """What came of a part. Our own errors travel as rows: of what a task raises, Ray Data hands on no more than the text."""
    try:
        return {"part": part, "content": work(), "error": b""}
    except FmrayError as error:
        return {"part": part, "content": b"", "error": pickle.dumps(error)}


class _Worker:
    """An actor; it builds at its first part, where an error can be told."""

    def __init__(self, build: Callable[[], Callable[[bytes], bytes]]) -> None:
        self._build = build
        self._work: Callable[[bytes], bytes] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row if row["error"] else _told(row["part"], lambda: self._worked(row["content"]))

    def _worked(self, content: bytes) -> bytes:
        if self._work is None:
            self._work = self._build()
        return self._work(content)


@lru_cache(maxsize=1)
def _fetched(source: Any) -> Any:
    return ray.get(source)
