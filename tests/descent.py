"""A door of a few lines that learns in no time: gradient descent on x², with reports, checkpoints and resume as real doors have.

After t steps x = Π(1 - lr) over the steps' rates, so what a sweep does to it can be told in closed form.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from fmray.config.base import ReportConfig, RunConfig, RuntimeConfig, Section
from fmray.config.sweep import SweepConfig
from fmray.errors import DataError
from fmray.manifest import manifest_text, newest_good, sum_file
from fmray.runtime.context import Context, Outcome
from fmray.runtime.launch import NO_POOLS
from fmray.runtime.metrics import drop_reports_after
from fmray.runtime.run_folder import RunFolder
from fmray.tuning.trials import Door, Trials


class RateConfig(Section):
    """How fast."""

    lr: float = 0.1
    """Share of x that a step takes away."""
    fails_at: int | None = None
    """Step that raises an error."""
    kills_at: int | None = None
    """Step at which the process dies, once."""
    seconds: float = 0.0
    """Time of a step."""


class StepsConfig(Section):
    """How long."""

    steps: int = 8
    """Steps in all."""
    evaluate_every: int | None = 2
    """Steps between two evaluations and checkpoints."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""


class DescentConfig(Section):
    """A whole descent."""

    run: RunConfig = RunConfig(name="descent")
    """Name, storage."""
    runtime: RuntimeConfig = RuntimeConfig(threads=1)
    """Where."""
    report: ReportConfig = ReportConfig(progress=False)
    """Where metrics go."""
    optimizer: RateConfig = RateConfig()
    """How fast."""
    train: StepsConfig = StepsConfig()
    """How long."""
    width: int = 1
    """A key that cannot change on the way."""


def descend(config: DescentConfig, context: Context) -> Outcome:
    first, x = resume(context.folder)
    for step in range(first, config.train.steps):
        if step == config.optimizer.fails_at:
            raise DataError(f"the data ends at step {step}")
        if step == config.optimizer.kills_at and not context.folder.exists("killed"):
            context.folder.write_text("once", "killed")
            os._exit(9)
        time.sleep(config.optimizer.seconds)
        x *= 1 - config.optimizer.lr
        done, last = step + 1, step + 1 == config.train.steps
        context.report(done, {"train/x": x})
        stopping = context.stop_requested() and not last
        every = config.train.evaluate_every
        if last or (every is not None and done % every == 0 and not stopping):
            context.report(done, {"eval/closeness": -abs(x), "eval/rate": config.optimizer.lr})
        if last or stopping or (every is not None and done % every == 0):
            save(context.folder, done, x, config.train.keep_checkpoints)
        if stopping:
            return Outcome(steps=done, finished=False)
    return Outcome(steps=config.train.steps, finished=True)


def resume(folder: RunFolder) -> tuple[int, float]:
    good, _ = newest_good(folder.filesystem, folder.path("checkpoints"))
    if good is None:
        drop_reports_after(folder, 0)
        return 0, 1.0
    state = json.loads(Path(good, "x.json").read_text())
    drop_reports_after(folder, state["step"])
    return int(state["step"]), float(state["x"])


def save(folder: RunFolder, step: int, x: float, keep: int) -> None:
    target = Path(folder.path("checkpoints", f"step-{step:08d}"))
    target.mkdir(parents=True, exist_ok=True)
    (target / "x.json").write_text(json.dumps({"step": step, "x": x}))
    (target / "manifest.json").write_text(manifest_text(step, [sum_file(target / "x.json", target)]))
    for old in sorted(target.parent.iterdir())[:-keep]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


def steps_of(config: DescentConfig) -> int:
    return config.train.steps


def no_pools(_config: DescentConfig) -> Any:
    return NO_POOLS


def no_check(_config: DescentConfig) -> None:
    pass


def may_change(_config: DescentConfig) -> tuple[str, ...]:
    return ("optimizer.lr",)


DOOR = Door(DescentConfig, {"descent": DescentConfig}, descend, steps_of, no_pools, no_check, may_change)


def descents(folder: Path, rates: tuple[float, ...] = (0.1, 0.5, 0.001), **changes: Any) -> Trials:
    """The trials of a sweep over learning rates; `changes` are keys of the sweep's configuration."""
    keys: dict[str, Any] = {
        "run": {"name": "sweep", "storage": str(folder)},
        "report": {"progress": False},
        "space": {"optimizer.lr": {"kind": "grid", "values": rates}},
        "metric": "eval/closeness",
        "root": "pretrain",
    }
    sweep = SweepConfig.model_validate(keys | changes)
    base = DescentConfig().model_dump()
    return Trials(sweep, DOOR, base, RunFolder.of(sweep.run))


def state_of(trials: Trials, number: int) -> tuple[int, float]:
    """Step and x of a trial's newest checkpoint."""
    home = trials.home(number)
    good, _ = newest_good(home.filesystem, home.path("checkpoints"))
    assert good is not None
    state = json.loads(Path(good, "x.json").read_text())
    return int(state["step"]), float(state["x"])
