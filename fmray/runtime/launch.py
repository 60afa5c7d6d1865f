"""One call from a configuration to work that runs: in this process, or on Ray Train's workers.

The work is a module-level function `work(config, context) -> Outcome`; it cannot tell the two apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from fmray.config.loading import dump_json
from fmray.config.schema import Section
from fmray.errors import ConfigError, require_package
from fmray.runtime.context import (
    Context,
    Outcome,
    WorkerContext,
    choose_device,
    prepare_process,
    stop_on_sigterm,
)
from fmray.runtime.metrics import ProgressBar, PrometheusReporter, make_reporters
from fmray.runtime.oversight import NO_OVERSIGHT, Oversight
from fmray.runtime.pool import LocalPools, PoolPlan
from fmray.runtime.run_folder import RunFolder

Work = Callable[[Any, Context], Outcome]
NO_POOLS = PoolPlan()

MAY_CHANGE = ("runtime", "report", "run", "engine", "evaluate", "train")
"""Sections that a resumed run may have otherwise: where it runs, how it is measured, how long."""


def launch(
    work: Work,
    config: Any,
    *,
    steps: int = 0,
    pools: PoolPlan = NO_POOLS,
    oversight: Oversight = NO_OVERSIGHT,
) -> Outcome:
    """Run the work where `config.runtime` says, with the pools it asks; resumes a run of the same name.

    `steps` scales the progress bar; `oversight` is for a caller that follows the run and may end it (a sweep).
    """
    folder = RunFolder.of(config.run)
    if config.run.fresh:
        folder.remove()
    prepare_folder(folder, config, (*MAY_CHANGE, *oversight.may_change))
    if config.runtime.kind == "ray":
        require_package("ray", "ray", "runtime.kind=ray")
        from fmray.runtime.ray_train import run_on_ray

        return run_on_ray(work, config, folder, steps, pools, oversight)
    return run_here(work, config, folder, steps, pools, oversight)


def prepare_folder(folder: RunFolder, config: Section, may_change: Sequence[str] = MAY_CHANGE) -> None:
    """Write config.json, or refuse to resume a run that was made of something else than `may_change` (keys, sections)."""
    folder.remove("stop")
    if folder.exists("config.json"):
        earlier, now = json.loads(folder.read_text("config.json")), json.loads(dump_json(config))
        for key, before, after in differences(earlier, now):
            allowed = any(key == known or key.startswith(f"{known}.") for known in may_change)
            if not allowed or (key == "run.seed" and key not in may_change):
                cure = f"run '{folder.url}' was made with {before!r}; take another run.name, or run.fresh=true to start over"
                raise ConfigError(key, after, cure)
    folder.write_text(dump_json(config), "config.json")


def differences(before: Any, after: Any, key: str = "") -> list[tuple[str, object, object]]:
    """Keys whose values differ between two nested mappings: (dotted key, before, after)."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [(key, before, after)]
    found = []
    for name in [*before, *(name for name in after if name not in before)]:
        inner = f"{key}.{name}" if key else name
        found += differences(before.get(name), after.get(name), inner)
    return found


def run_here(
    work: Work,
    config: Any,
    folder: RunFolder,
    steps: int,
    pools: PoolPlan = NO_POOLS,
    oversight: Oversight = NO_OVERSIGHT,
) -> Outcome:
    """Rank 0 of 1, in this process; no Ray."""
    prepare_process(config.runtime)
    device = choose_device(config.runtime.device)
    reporters = make_reporters(config.report, folder, config.run.name)
    if config.report.prometheus_port is not None:
        reporters.append(PrometheusReporter(config.report.prometheus_port))
    bar = ProgressBar(steps, config.run.name) if config.report.progress and steps else None
    if bar is not None:
        reporters.append(bar)
    reporters.append(oversight.tell)
    try:
        with stop_on_sigterm() as asked:
            context = WorkerContext(
                rank=0,
                world_size=1,
                device=device,
                folder=folder,
                pools=LocalPools(pools, device),
                reporters=reporters,
                stop_flag=lambda: asked() or oversight.stop() or folder.exists("stop"),
            )
            return work(config, context)
    finally:
        if bar is not None:
            bar.close()
