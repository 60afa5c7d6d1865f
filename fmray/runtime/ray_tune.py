"""The Ray Tune door: trials as Tune trials, under Tune's own schedulers. Imports ray; knows no room, it is handed callables.

Tune decides between two calls of the trial's function alone: the function runs its trial to the next milestone, where it is
saved and ended, and reports. Nothing of a trial is in memory while Tune stops, pauses or clones it, so the checkpoint that Tune
keeps is a pointer to the trial, and a trial may go on in any process.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from fmray.config.sweep import Scheduler as Rule
from fmray.config.sweep import SweepRuntimeConfig
from fmray.runtime.context import stop_on_sigterm
from fmray.runtime.ray_cluster import connected, require_resources

POINTER = "pointer.json"


@dataclass(frozen=True, slots=True)
class Pointer:
    """What Tune keeps as a checkpoint: the trial (itself after a pause, another one to go on from) and the reported step."""

    trial: str
    step: int


Play = Callable[[str, dict[str, Any], Pointer | None], Iterator[tuple[int, float]]]
"""`play(trial, keys, pointer)` runs a trial from milestone to milestone and yields (step, score), larger is better, of steps
after the pointer's. Travels to workers; what a trial raises it keeps to itself."""


@dataclass(frozen=True, slots=True)
class TunePlan:
    """What Tune is to run."""

    play: Play
    trials: tuple[tuple[str, dict[str, Any]], ...]
    """Names and keys, in the order of starting."""
    rule: Rule
    """Tune's scheduler."""
    steps: int
    """Steps of a whole trial."""
    explore: Callable[[dict[str, Any]], dict[str, Any]]
    """PBT: a donor's keys in, mutated ones out."""
    demand: dict[str, float]
    """Resources of a whole trial, its learners and pools included."""
    runtime: SweepRuntimeConfig
    storage: str
    """Folder or URL for Tune's own state, `tune/` within it."""


@dataclass(frozen=True, slots=True)
class Watcher:
    """What the driver does when something happens."""

    asked: Callable[[], bool]
    """Whether the sweep should end; running trials see that for themselves."""
    interrupt: Callable[[], None]
    """A signal asks the sweep to end."""
    changed: Callable[[], object]
    """A trial has reported, ended or been lost."""
    ended: Callable[[str], None]
    """A trial is over: its function returned, or its scheduler stopped it."""
    lost: Callable[[str, str], None]
    """A trial's process died more often than allowed; the error as a line."""


def run_with_tune(plan: TunePlan, watcher: Watcher) -> None:
    """Run all trials; returns when every one is over, or the running ones have ended after `watcher.asked()`."""
    with connected(plan.runtime.address), stop_on_sigterm() as signalled:
        cure = "lower runtime.cpus_per_trial or runtime.gpus_per_trial, or the trial's own workers and pools"
        require_resources(plan.demand, "the processes of one trial", cure)
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # signals are ours
        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial may end before its first report
        os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # trials say theirs in one line
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # with it, verbose=0 still prints
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # trials keep their own metrics
        logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # which misses those loggers' files
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths of the configuration mean what they mean locally
        ears, population = _Ears(watcher), plan.rule.kind == "pbt"
        at_once = plan.runtime.max_concurrent or _fitting(plan.demand)
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trial, play=plan.play, keep=population),
                {"cpu": plan.runtime.cpus_per_trial, "gpu": plan.runtime.gpus_per_trial}
                | (_share_of_memory(at_once) if population else {}),
            ),
            param_space={
                "trial": tune.grid_search([{"name": name, "keys": keys} for name, keys in plan.trials])
            },
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                scheduler=_scheduler(plan),
                max_concurrent_trials=None if population else at_once,
                reuse_actors=True,  # a new worker imports torch anew
                trial_name_creator=_name_of,
                trial_dirname_creator=_name_of,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=plan.storage,
                failure_config=tune.FailureConfig(max_failures=plan.runtime.max_failures),
                callbacks=[ears],
                stop=_Stop(ears, signalled),
                verbose=0,
            ),
        )
        tuner.fit()


def _fitting(demand: dict[str, float]) -> int:
    """How many trials the cluster holds at once, at least one."""
    has = ray.cluster_resources()
    return max(1, int(min(has.get(name, 0) / amount for name, amount in demand.items() if amount)))


def _share_of_memory(trials: int) -> dict[str, float]:
    """What lets only so many trials run at once where all of them must be known to Tune: it pauses some for others then.

    Tune's own limit counts paused trials. Memory is a resource of every node that learners and pools do not ask for.
    """
    nodes = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
    return {"memory": int(min(max(nodes), sum(nodes) / trials))}


def _name_of(trial: Any) -> str:
    return str(trial.config["trial"]["name"])


def _scheduler(plan: TunePlan) -> TrialScheduler:
    rule = plan.rule
    if rule.kind == "asha":
        return ASHAScheduler(
            time_attr="step",
            max_t=plan.steps,
            grace_period=min(rule.grace, plan.steps),
            reduction_factor=rule.reduction,
        )
    if rule.kind == "pbt":

        def explore(config: dict[str, Any]) -> dict[str, Any]:
            return {"trial": {**config["trial"], "keys": plan.explore(config["trial"]["keys"])}}

        return _FairPbt(
            time_attr="step",
            perturbation_interval=rule.interval,
            quantile_fraction=rule.quantile,
            custom_explore_fn=explore,
            log_config=False,
            require_attrs=False,  # a trial that fails before its first report has none
        )
    return FIFOScheduler()


class _FairPbt(PopulationBasedTraining):  # type: ignore[misc]
    """Tune's PBT, but whoever had the fewest turns goes next.

    Its own choice is the trial that is furthest behind, and one that exploits takes over its donor's clock: where not all of a
    population run at once, it would be chosen again and again, and the donors never.
    """

    def __init__(self, **rules: Any) -> None:
        super().__init__(**rules)
        self._turns: Counter[str] = Counter()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._turns[trial.trial_id] += 1
        return str(super().on_trial_result(tune_controller, trial, result))

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        waiting = [t for t in tune_controller.get_trials() if t.status in (Trial.PENDING, Trial.PAUSED)]
        return min(waiting, key=lambda trial: self._turns[trial.trial_id], default=None)


# ------------------------------------------------------------------------------------------------------------ on a worker


def _trial(config: dict[str, Any], play: Play, keep: bool) -> None:
    """What Tune calls: anew after each pause and each exploit."""
    name = str(tune.get_context().get_trial_name())
    for step, score in play(name, config["trial"]["keys"], _pointer()):
        if keep:
            with tempfile.TemporaryDirectory() as folder:
                pointer = asdict(Pointer(name, step))
                Path(folder, POINTER).write_text(json.dumps(pointer), encoding="utf-8")
                tune.report({"step": step, "score": score}, checkpoint=tune.Checkpoint.from_directory(folder))
        else:
            tune.report({"step": step, "score": score})


def _pointer() -> Pointer | None:
    """Where Tune wants the trial to go on, if it was there before or exploits another."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return Pointer(**json.loads(Path(folder, POINTER).read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------------------- on the driver


class _HereOnly:
    """Tune pickles what it is given, to restore an experiment elsewhere; ours goes on from the trials' own folders."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Ears(_HereOnly, tune.Callback):  # type: ignore[misc]
    """Tune's events, passed on."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.running: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.add(trial.trial_id)
        self.watcher.changed()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.watcher.changed()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.discard(trial.trial_id)
        self.watcher.ended(str(trial))
        self.watcher.changed()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.discard(trial.trial_id)
        lines = str(trial.get_error() or "its process died").strip().splitlines()
        self.watcher.lost(str(trial), lines[0])
        self.watcher.changed()


class _Stop(_HereOnly, tune.Stopper):  # type: ignore[misc]
    """Starts no further trial once the sweep is asked to end and the running ones have."""

    def __init__(self, ears: _Ears, signalled: Callable[[], bool]) -> None:
        self._ears, self._signalled, self._told = ears, signalled, False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._signalled() and not self._told:
            self._told = True
            self._ears.watcher.interrupt()
        return self._ears.watcher.asked() and not self._ears.running
