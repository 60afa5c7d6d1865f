"""`fmray benchmark ppo`: PPO beside trl 0.11.4, decoding beside transformers, what loop and pools add; one run, one table.

Every figure is the median of repeats; two sides that are compared alternate (A B A B …), each waiting while the other works.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fmray.benchmarks.command import PARITY, read_options, run_parts
from fmray.benchmarks.peers import TRL_0_11, Measured, Side, environment, held_side, ppo_side, trl_side
from fmray.benchmarks.ppo_bench import FULL, QUICK, PpoBench, Precision, cpu_has_bf16
from fmray.benchmarks.ppo_pools import dispatch, publishing
from fmray.benchmarks.table import Row
from fmray.config.pools import PoolConfig
from fmray.config.rlhf import RlhfConfig
from fmray.errors import ResourceError

SAME_LENGTH = 0.15
"""Samples of one policy by two sources of noise differ in their mean length by less, at the full sizes."""
PHASES = ("act", "judge", "credit", "learn", "refresh")


# -------------------------------------------------------------------------------------------------------------------- trl


def trl(bench: PpoBench) -> list[Row]:
    """Whole iterations of both: generate, judge by a cheap rule and the reference, credit, learn; ours publishes too."""
    theirs, sizes = trl_side(TRL_0_11.python(PARITY), bench.sizes.threads), bench.sizes
    prompts, rows = _same_question(bench, theirs)
    found = _iterations(bench, theirs, prompts)
    tokens = {
        name: statistics.mean(of["tokens"] for of in each) / sizes.batch for name, each in found.items()
    }
    rows.append(
        Row(
            "mean response length of the measured iterations: relative difference",
            f"{tokens['fp32']:.2f} tokens",
            f"{tokens['trl']:.2f} tokens",
            abs(tokens["fp32"] / tokens["trl"] - 1),
            SAME_LENGTH,
            "lower",
        )
    )
    peer = Measured(tuple(sizes.batch / of["seconds"] for of in found["trl"]))
    how = f"batch {sizes.batch}, up to {sizes.new_tokens} new tokens, {sizes.threads} threads"
    bars: dict[Precision, float | None] = {"fp32": 1.2, "bf16": 2.5 if cpu_has_bf16() else None}
    for precision, bar in bars.items():
        ours = Measured(tuple(sizes.batch / of["seconds"] for of in found[precision]))
        what = f"PPO iteration in {precision}, {how}; theirs in fp32"
        ratio = ours.median / peer.median
        rows.append(Row(what, ours.shown("samples/s"), peer.shown("samples/s"), ratio, bar))
        laps = {phase: statistics.median(of[f"time/{phase}"] for of in found[precision]) for phase in PHASES}
        told = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in laps.items())
        gap = max(of["ppo/logp_difference"] for of in found[precision])
        bench.notes.append(f"trl, ours in {precision}: {told}; |learner's - rollout's logp| {gap:.4f} nats.")
    share = statistics.median(of["generate"] / of["seconds"] for of in found["trl"])
    bench.notes.append(f"trl: theirs generates in {share:.0%} of its time, all of a batch's prompts at once.")
    return rows


def _same_question(bench: PpoBench, theirs: Side) -> tuple[list[list[list[int]]], list[Row]]:
    """The prompts of each iteration, and rows that say whether both sides read and answer them alike."""
    with ppo_side(bench.sizes.threads) as ours:
        ours.ask("prepare", config=bench.save(bench.config("questions")))
        asked = [ours.ask("prompts", iteration=i) for i in range(bench.sizes.repeats + 1)]
        answers = ours.ask("greedy", prompts=asked[0]["ids"])
    with theirs:
        bench.peer |= _prepare_peer(bench, theirs)
        read = [theirs.ask("tokenized", texts=one["texts"]) for one in asked]
        greedy = theirs.ask("greedy", prompts=asked[0]["ids"])
    prompts = [one["ids"] for one in asked]
    others = sum(
        a != b for mine, peers in zip(prompts, read, strict=True) for a, b in zip(mine, peers, strict=True)
    )
    differ = sum(a != b for a, b in zip(answers, greedy, strict=True))
    tokens = (sum(map(len, answers)), sum(map(len, greedy)))
    return prompts, [
        Row(
            f"prompts that the peer's tokenizer reads otherwise, of {sum(map(len, prompts))}",
            "",
            "",
            others,
            0,
            "lower",
        ),
        Row(
            f"greedy answers to the same prompts, of {len(answers)}: how many differ",
            f"{tokens[0]} tokens",
            f"{tokens[1]} tokens",
            differ,
            len(answers) // 32,  # a tie that rounding decides
            "lower",
        ),
    ]


def _prepare_peer(bench: PpoBench, theirs: Side) -> dict[str, str]:
    sizes = bench.sizes
    versions: dict[str, str] = theirs.ask(
        "prepare",
        folder=str(bench.folder / "peer"),
        batch=sizes.batch,
        mini_batch=sizes.mini_batch,
        epochs=sizes.epochs,
        new_tokens=sizes.new_tokens,
        threads=sizes.threads,
    )
    return versions


def _iterations(
    bench: PpoBench, theirs: Side, prompts: list[list[list[int]]]
) -> dict[str, list[dict[str, float]]]:
    """Each side's measured iterations: seconds, response tokens, and what else it tells. The first one warms up."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*precisions, "trl")}
    configs = [bench.save(bench.config(f"ppo-{precision}", precision)) for precision in precisions]
    fp32, bf16 = (held_side(config, bench.sizes.threads) for config in configs)
    with fp32, bf16, theirs:
        _prepare_peer(bench, theirs)
        for asked in prompts:
            found["fp32"].append(fp32.ask("iteration"))
            found["trl"].append(theirs.ask("iteration", prompts=asked))
            found["bf16"].append(bf16.ask("iteration"))
    return {name: each[1:] for name, each in found.items()}


# ----------------------------------------------------------------------------------------------------------------- decode


def decode(bench: PpoBench) -> list[Row]:
    """Tokens/s of both families beside `generate`, in a process of its own."""
    rows, sizes = [], bench.sizes
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
    with ppo_side(sizes.threads) as ours:
        ours.ask("prepare", config=bench.save(bench.config("decode")))
        for family, source in {"encoder-decoder": bench.policy, "decoder-only": bench.causal}.items():
            name = source.removeprefix("asset:") if sizes.real else "tiny"
            for precision, ends in [(precision, False) for precision in precisions] + [("fp32", True)]:
                speed = ours.ask(
                    "decode", source=source, precision=precision, ends=ends, rounds=sizes.decode_rounds
                )
                length = "until EOS" if ends else f"{sizes.new_tokens} tokens each"
                spread = f"rounds {min(speed['ratios']):.2f}–{max(speed['ratios']):.2f}"
                rows.append(
                    Row(
                        f"decoding, {family} ({name}), {precision}, batch {speed['batch']}, {length}; {spread}",
                        f"{speed['ours']:.0f} tokens/s",
                        f"{speed['theirs']:.0f} tokens/s",
                        speed["ratio"],
                        None if ends else 1.5,
                    )
                )
    return rows


# --------------------------------------------------------------------------------------------------------------- overhead


def overhead(bench: PpoBench) -> list[Row]:
    """The loop's iterations over their own model calls alone, in one process and with a learner and pools on Ray."""
    config = bench.config("loop", learns=False)  # the weights stay, so that every road meets the same tensors
    loop, bare = _in_one_process(bench, config)
    on_ray, beside = _with_pools(bench, config)
    differing = sum(abs(a["tokens"] - b["tokens"]) for a, b in zip(loop, bare, strict=True))
    rows = [
        Row("response tokens of the loop's iterations and of the bare calls", "", "", differing, 0.5, "lower")
    ]
    what = (
        f"iteration / its own generate, forward, backward and step calls, batch {config.rollout.batch_size}"
    )
    for place, mine, theirs, bar in (
        ("in one process", [of["seconds"] for of in loop], [of["seconds"] for of in bare], 1.15),
        ("learner under Ray Train, pools as actors", on_ray, beside, 1.25),
    ):
        a, b = Measured(tuple(mine)), Measured(tuple(theirs))
        rows.append(Row(f"{what}: {place}", a.shown("s"), b.shown("s"), a.median / b.median, bar, "lower"))
    return rows


def _in_one_process(
    bench: PpoBench, config: RlhfConfig
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Iterations of the loop and their bare calls, one and one: seconds and tokens; the first of each warms up."""
    path, threads = bench.save(config), bench.sizes.threads
    loop, bare = [], []
    with held_side(path, threads) as held, ppo_side(threads) as stripped:
        stripped.ask("prepare", config=path)
        for iteration in range(bench.sizes.repeats + 1):
            loop.append(held.ask("iteration"))
            bare.append(stripped.ask("bare_calls", iteration=iteration))
    return loop[1:], bare[1:]


def _with_pools(bench: PpoBench, config: RlhfConfig) -> tuple[list[float], list[float]]:
    """Seconds of the iterations of runs on Ray, and of the same iterations' bare calls in one process after each run."""
    on_ray, bare = [], []
    for repeat in range(bench.sizes.ray_repeats):
        on_ray += _on_ray(bench, config, repeat)
        with ppo_side(bench.sizes.threads) as stripped:
            stripped.ask("prepare", config=bench.save(config))
            stripped.ask("bare_calls", iteration=0)
            for iteration in range(1, bench.sizes.ray_iterations):
                bare.append(stripped.ask("bare_calls", iteration=iteration)["seconds"])
    return on_ray, bare


def _on_ray(bench: PpoBench, config: RlhfConfig, repeat: int) -> list[float]:
    """Seconds of each iteration but the first of a run started as a user starts it, from one report to the next."""
    small = PoolConfig(cpus=0.25, threads=config.runtime.threads)
    config = config.replace(
        run=config.run.replace(name=f"pools-{repeat}"),
        runtime=config.runtime.replace(kind="ray", workers=1, cpus_per_worker=0.5),
        rollout=config.rollout.replace(pool=small),
        reference=config.reference.replace(pool=small),
        train=config.train.replace(iterations=bench.sizes.ray_iterations),
    )
    command = [sys.executable, "-m", "fmray.cli", "rlhf", "--config", bench.save(config)]
    threads = environment(bench.sizes.threads)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=threads)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ResourceError(f"{config.run.name} ended with {done.returncode}: {last}")
    text = (Path(config.run.storage) / config.run.name / "metrics.jsonl").read_text(encoding="utf-8")
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    reported = [float(line["time"]) for line in lines if "time/step" in line]
    return [after - before for before, after in pairwise(reported)]


PARTS: dict[str, Callable[[PpoBench], list[Row]]] = {
    "trl": trl,
    "decode": decode,
    "overhead": overhead,
    "dispatch": dispatch,
    "publish": publishing,
}


def run_ppo(arguments: Sequence[str]) -> list[Row]:
    """Parse, measure, append the table; the rows."""
    options = read_options("ppo", __doc__, list(PARTS), arguments)
    with tempfile.TemporaryDirectory(prefix="fmray-benchmark-") as folder:
        bench = PpoBench(Path(folder), QUICK if options.quick else FULL)
        bench.make()
        return run_parts(PARTS, options, bench)
