"""A sweep from its configuration to its report: which door is swept, what all its trials share, where they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fmray.config.loading import compose, read_file
from fmray.config.rlhf import RlhfConfig
from fmray.config.sweep import MAY_CHANGE, SweepConfig
from fmray.errors import SweepError, require_package
from fmray.pipeline.sweep_report import write_sweep_report
from fmray.runtime.launch import NO_POOLS, prepare_folder
from fmray.runtime.run_folder import RunFolder
from fmray.tuning.local import run_in_turn
from fmray.tuning.on_ray import run_on_tune
from fmray.tuning.space import nest
from fmray.tuning.table import Row, as_text, best_of, write_table
from fmray.tuning.trials import Door, Trials, keys_text

# ------------------------------------------------------------------------------------------------- what can be swept


def pretrain_door() -> Door:
    """Contrastive pretraining."""
    from fmray.config.recipes import PRETRAIN_RECIPES
    from fmray.config.schema import PretrainConfig
    from fmray.training.loop import pretrain
    from fmray.training.preflight import check_pretrain

    return Door(
        root=PretrainConfig,
        recipes=PRETRAIN_RECIPES,
        work=pretrain,
        steps=lambda config: int(config.train.steps),
        pools=lambda config: NO_POOLS,
        check=check_pretrain,
        may_change=lambda config: ("optimizer.*", "objective.*", "parts.*.lr", "parts.*.weight_decay"),
    )


def rlhf_door() -> Door:
    """PPO under weighted rewards."""
    from fmray.config.rlhf_recipes import RLHF_RECIPES
    from fmray.rlhf.loop import train_ppo
    from fmray.rlhf.roles import pool_plan

    return Door(
        root=RlhfConfig,
        recipes=RLHF_RECIPES,
        work=train_ppo,
        steps=lambda config: int(config.train.iterations),
        pools=pool_plan,
        check=lambda config: None,
        may_change=ppo_may_change,
    )


def ppo_may_change(config: RlhfConfig) -> tuple[str, ...]:
    """The coefficient of an adaptive KL controller is the checkpoint's; its target, or a fixed one, is the configuration's."""
    kl = (
        ("ppo.kl.coefficient",)
        if config.ppo.kl.controller == "fixed"
        else ("ppo.kl.target", "ppo.kl.horizon")
    )
    rewards = ("rewards.*.weight", "rewards.*.clip", "ppo.missing_eos_penalty")
    losses = ("ppo.clip", "ppo.value_clip", "ppo.*_coefficient", "ppo.gamma", "ppo.lam", "optimizer.*")
    return (*rewards, *kl, *losses, "rollout.temperature")


DOORS: dict[str, Callable[[], Door]] = {"pretrain": pretrain_door, "rlhf": rlhf_door}

# -------------------------------------------------------------------------------------------------------------- a sweep


@dataclass(frozen=True, slots=True)
class SweepEnd:
    """How a sweep ended."""

    rows: list[Row]
    best: Row | None
    finished: bool
    """False: it was told to stop, and the running trials have saved."""
    text: str
    """The table, the best trial, and where the report is."""


def open_sweep(config: SweepConfig) -> Trials:
    """The trials of a sweep, new or gone on with; nothing runs yet. Raises ConfigError."""
    folder = RunFolder.of(config.run)
    if config.run.fresh:
        folder.remove()
    door = DOORS[config.root]()
    layers = [read_file(Path(config.file))] if config.file else []
    base = compose(door.root, door.recipes, config.recipe, [*layers, nest(config.base)])
    trials = Trials(config, door, base, folder)
    trials.check()
    prepare_folder(folder, config, MAY_CHANGE)
    return trials


def run_sweep(config: SweepConfig, say: Callable[[str], None]) -> SweepEnd:
    """Run or go on with a sweep; raises SweepError where every trial failed.

    `say` gets a line for every trial that ends (with report.progress).
    """
    if config.runtime.kind == "ray":
        require_package("ray", "ray", "runtime.kind=ray")
    trials = open_sweep(config)
    trials.forgive()
    run = run_in_turn if config.runtime.kind == "local" else run_on_tune
    progress = Progress(trials, say if config.report.progress else lambda _line: None)
    run(trials, progress)
    rows = progress()
    if all(row.status == "failed" for row in rows):
        raise SweepError(f"all {len(rows)} trials failed; the first: {rows[0].note}")
    best = best_of(rows, trials)
    lines = [as_text(rows, trials), f"report: {write_sweep_report(rows, trials)}"]
    if best is not None:
        lines.insert(1, f"best: {best.name} with {keys_text(best.keys)}")
    finished = all(row.status in ("finished", "stopped", "failed") for row in rows)
    return SweepEnd(rows, best, finished, "\n".join(lines))


class Progress:
    """Keeps sweep.json as the trials are, and says each one's end once."""

    def __init__(self, trials: Trials, say: Callable[[str], None]) -> None:
        self._trials, self._say = trials, say
        over = ("finished", "stopped", "failed")
        self._said = {
            trials.name(number) for number in trials.numbers if trials.record(number).status in over
        }

    def __call__(self) -> list[Row]:
        rows, metric = write_table(self._trials), self._trials.sweep.metric
        for row in rows:
            if row.status in ("finished", "stopped", "failed") and row.name not in self._said:
                self._said.add(row.name)
                value = f"{metric} {row.metrics[metric]:.4g}" if row.metrics else ""
                parts = (f"{row.name} {row.status} at step {row.step}", value, keys_text(row.keys), row.note)
                self._say("; ".join(part for part in parts if part))
        return rows
