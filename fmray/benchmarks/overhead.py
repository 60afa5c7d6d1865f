"""Ray's overhead: the same `fmray pretrain` in one process and on Ray Train, each run started as a user starts it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmray.benchmarks.peers import environment
from fmray.benchmarks.workbench import Sizes, pretrain_config
from fmray.config.loading import dump_json
from fmray.errors import ResourceError

WARM_UP = 3
"""A share of 1/WARM_UP of the steps is not counted: Ray's own processes start beside the first ones."""

WAYS: dict[str, dict[str, Any]] = {
    "local": {},
    "ray 1": {"kind": "ray", "workers": 1},
    "ray 2": {"kind": "ray", "workers": 2},
}


def compare_launchers(folder: Path, sizes: Sizes) -> dict[str, list[float]]:
    """Per way the median seconds of a step after the warm-up, once per repeat; runs alternate. Two workers run once."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(sizes.ray_repeats):
        for name in WAYS:
            if name != "ray 2" or repeat == 0:
                found[name].append(_median_step(folder, sizes, name, repeat))
    return found


def _median_step(folder: Path, sizes: Sizes, name: str, repeat: int) -> float:
    way = WAYS[name]
    workers = way.get("workers", 1)
    threads = max(1, sizes.threads // workers)
    config = pretrain_config(folder, replace(sizes, batch=sizes.ray_batch))
    run = config.run.replace(name=f"{name.replace(' ', '-')}-{repeat}")
    runtime = config.runtime.replace(**way, threads=threads, cpus_per_worker=float(threads))
    path = folder / f"{run.name}.json"
    path.write_text(dump_json(config.replace(run=run, runtime=runtime)), encoding="utf-8")
    command = [sys.executable, "-m", "fmray.cli", "pretrain", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(threads))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ResourceError(f"{run.name} ended with {done.returncode}: {last}")
    lines = (folder / "runs" / run.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds: list[float] = [line["time/step"] for line in map(json.loads, lines) if "time/step" in line]
    return statistics.median(seconds[len(seconds) // WARM_UP :])
