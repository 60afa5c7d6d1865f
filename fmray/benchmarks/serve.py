"""`fmray benchmark serve`: an endpoint under load beside the bare engine, Infinity, plain FastAPI and itself without batches.

Server and load generator have a core each, the server one torch thread; sides take turns in one run.
Models other than fresh ones: --emoji, --vqa, --llm FOLDER.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fmray.benchmarks.command import PARITY, read_options, run_parts
from fmray.benchmarks.serve_answers import answers
from fmray.benchmarks.serve_bench import FULL, QUICK, ServeBench
from fmray.benchmarks.serve_clip import clip
from fmray.benchmarks.serve_latency import latency
from fmray.benchmarks.serve_overload import overload
from fmray.benchmarks.table import Row
from fmray.errors import require_package

PARTS: dict[str, Callable[[ServeBench], list[Row]]] = {
    "clip": clip,
    "answers": answers,
    "latency": latency,
    "overload": overload,
}
MODELS = ("emoji", "vqa", "llm")


def run_serve(arguments: Sequence[str]) -> list[Row]:
    """Parse, measure, append the table; the rows."""
    require_package("fastapi", "serve", "benchmark serve")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in MODELS:
        parser.add_argument(f"--{name}", type=Path)
    models, rest = parser.parse_known_args(list(arguments))
    options = read_options("serve", __doc__, list(PARTS), rest)
    given = {name: path for name, path in vars(models).items() if path is not None}
    with tempfile.TemporaryDirectory(prefix="fmray-benchmark-") as folder:
        bench = ServeBench(Path(folder), PARITY, QUICK if options.quick else FULL, given)
        with _bound(bench):
            return run_parts(PARTS, options, bench)


@contextmanager
def _bound(bench: ServeBench) -> Iterator[None]:
    """This process, which makes the load, on its core; where it was afterwards."""
    if bench.load_core is None:
        bench.notes.append("Server and load generator share all cores: they could not be bound to one each.")
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {bench.load_core})
    bench.notes.append(
        f"Server on core {bench.server_core}, load generator on core {bench.load_core}; one torch thread; priority {os.nice(0)}."
    )
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
