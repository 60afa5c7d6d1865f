"""The part `answers` of `fmray benchmark serve`: many clients' questions answered together, beside one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fmray.benchmarks.load import Load
from fmray.benchmarks.peers import Measured
from fmray.benchmarks.serve_bench import ServeBench
from fmray.benchmarks.serve_processes import our_server
from fmray.benchmarks.table import Row

CHAT = "/v1/chat/completions"


def answers(bench: ServeBench) -> list[Row]:
    """Both families."""
    sizes = bench.sizes
    rows = _batched(bench, bench.names["vqa"], bench.vqa, sizes.answers, 5.0)
    return rows + _batched(bench, bench.names["llm"], bench.llm, sizes.llm_answers, None)


def _batched(bench: ServeBench, name: str, model: Path, count: int, bar: float | None) -> list[Row]:
    """`count` questions by all clients at once; a fourth of them to a server that answers one at a time, and by one client."""
    sizes, core, bodies = bench.sizes, bench.server_core, bench.chat_bodies()
    few = max(count // 4, min(count, len(bodies)))
    with our_server(model, core) as many, our_server(model, core, "batch.max_items=1") as single:
        together = _said(bench.closed(many, CHAT, bodies, 2 * len(bodies), keep=True))
        alone = _said(bench.closed(single, CHAT, bodies, len(bodies), 1, keep=True))
        differ = sum(together[number] != alone[number % len(bodies)] for number in together)
        ways: dict[str, Callable[[], Load]] = {
            "together": lambda: bench.closed(many, CHAT, bodies, count),
            "one item": lambda: bench.closed(single, CHAT, bodies, few),
            "one client": lambda: bench.closed(many, CHAT, bodies, few, 1),
        }
        loads: dict[str, list[Load]] = {way: [] for way in ways}
        for _ in range(sizes.repeats):
            for way, ask in ways.items():
                loads[way].append(ask())
    found = {way: Measured(tuple(load.rate for load in runs)) for way, runs in loads.items()}
    mine = found["together"]
    tokens = [tokens for _, tokens in together.values()]
    what = f"{name}, fp32, {sum(tokens) / len(tokens):.1f} tokens an answer, {sizes.clients} clients"
    bench.notes.append(f"{what}: {loads['together'][-1].shown}; one client {loads['one client'][-1].shown}.")
    texts = [{text for text, _ in said.values()} for said in (together, alone)]
    shown = mine.shown("answers/s", 4)
    return [
        Row(
            f"{what}: answers that differ, together and one at a time",
            f"{len(texts[0])} distinct",
            f"{len(texts[1])} distinct",
            differ,
            0,
            "lower",
        ),
        Row(
            f"{what}; before: the same clients, one at a time (batch.max_items=1)",
            shown,
            found["one item"].shown("answers/s", 4),
            mine.median / found["one item"].median,
            bar,
        ),
        Row(
            f"{what}; before: one client",
            shown,
            found["one client"].shown("answers/s", 4),
            mine.median / found["one client"].median,
            bar,
        ),
    ]


def _said(load: Load) -> dict[int, tuple[str, int]]:
    """Each request's answer and how many tokens it has."""
    said = {}
    for shot in load.shots:
        reply = json.loads(shot.body)
        said[shot.number] = (reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"])
    return said
