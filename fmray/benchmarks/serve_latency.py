"""The part `latency` of `fmray benchmark serve`: what HTTP and the batcher add to a lone request."""

from __future__ import annotations

from fmray.benchmarks.load import percentile
from fmray.benchmarks.peers import Measured
from fmray.benchmarks.serve_bench import ServeBench
from fmray.benchmarks.serve_clip import EMBEDDINGS
from fmray.benchmarks.serve_processes import bare_side, our_server
from fmray.benchmarks.table import Row


def latency(bench: ServeBench) -> list[Row]:
    """One client of the emoji CLIP, beside the engine called directly, on the same core in turn."""
    sizes, core = bench.sizes, bench.server_core
    bodies = bench.embedding_bodies(bench.drawings)
    direct: list[float] = []
    through: list[float] = []
    tails: list[float] = []
    with our_server(bench.emoji, core) as ours, bare_side() as bare:
        bare.ask("prepare", model=str(bench.emoji), pictures=str(bench.drawings), core=core)
        bare.ask("singles", count=sizes.singles)
        bench.closed(ours, EMBEDDINGS, bodies, sizes.singles, 1)
        for _ in range(max(3, sizes.repeats)):
            taken = bare.ask("singles", count=sizes.singles)
            load = bench.closed(ours, EMBEDDINGS, bodies, sizes.singles, 1)
            direct.append(1000 * percentile(taken, 0.5))
            through.append(1000 * load.percentile(0.5))
            tails.append(1000 * (load.percentile(0.99) - percentile(taken, 0.99)))
    added = Measured(tuple(a - b for a, b in zip(through, direct, strict=True)))
    what = f"{bench.names['emoji']}, one client: p50 with HTTP and batcher, over the engine alone (ms added: {added.shown('ms')})"
    bench.notes.append(
        f"latency: p99 of ours less p99 of the engine alone: {Measured(tuple(tails)).shown('ms')}."
    )
    return [
        Row(
            what,
            Measured(tuple(through)).shown("ms"),
            Measured(tuple(direct)).shown("ms"),
            added.median,
            2.0,
            "lower",
        )
    ]
