"""The sweep on Ray Tune: which trials it is handed, and what a worker does with one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any

from fmray.config.loading import merge
from fmray.errors import CheckpointError
from fmray.runtime.oversight import stop_file
from fmray.tuning.readings import score
from fmray.tuning.space import mutate
from fmray.tuning.trials import Change, Trials

if TYPE_CHECKING:
    from fmray.runtime.ray_tune import Pointer


def run_on_tune(trials: Trials, changed: Callable[[], object]) -> None:
    """All trials that are not over, under Tune's scheduler; a signal or a `stop` file ends it, the running trials saved.

    ASHA is told again what trials that are over have shown, so that a sweep that goes on judges by all of them.
    """
    from fmray.runtime.ray_tune import TunePlan, Watcher, run_with_tune

    trials, rule = with_threads(trials), trials.sweep.scheduler
    asked = stop_file(trials.folder)

    def interrupt() -> None:
        trials.folder.write_text("asked by a signal to the driver\n", "stop")  # every trial looks for it

    def ended(name: str) -> None:
        number = trials.number(name)
        if rule.kind == "asha" and trials.record(number).status == "paused" and not asked():
            trials.give_up(number)

    def lost(name: str, error: str) -> None:
        trials.fail(trials.number(name), f"its process died: {error}")

    over = [n for n in trials.numbers if trials.record(n).status in ("finished", "stopped")]
    others = [number for number in trials.numbers if number not in over]
    plan = TunePlan(
        play=partial(play, trials),
        trials=tuple(
            (trials.name(number), trials.record(number).keys)
            for number in [*(over if rule.kind == "asha" else []), *others]
        ),
        rule=rule,
        steps=trials.door.steps(trials.config(0)),
        explore=explorer(trials),
        demand=demand(trials),
        runtime=trials.sweep.runtime,
        storage=trials.folder.url,
    )
    trials.folder.remove("tune")
    if others:
        run_with_tune(plan, Watcher(asked, interrupt, changed, ended, lost))


def play(
    trials: Trials, name: str, keys: dict[str, Any], pointer: Pointer | None
) -> Iterator[tuple[int, float]]:
    """On a worker: a trial from milestone to milestone, each as (step, score); what it raises is in its record."""
    number, stop = trials.number(name), stop_file(trials.folder)
    if pointer is not None and pointer.trial != name:
        change = Change(pointer.step, pointer.trial, keys)
        taken = trials.record(number).changes[-1:]
        if not taken or as_json(taken[0]) != as_json(change):  # else its worker died after the copy was made
            try:
                trials.adopt(number, change)
            except CheckpointError as error:
                trials.fail(number, str(error))
                return
    shown = -1 if pointer is None else pointer.step
    for milestone in [*trials.milestones(), None]:
        if milestone is not None and milestone <= shown:
            continue
        reading = trials.advance(number, milestone, stop)
        if reading is None:
            return
        if reading.step > shown:
            yield reading.step, score(reading, trials.sweep)
        shown = reading.step


def as_json(change: Change) -> str:
    """For comparing: a tuple that was on disk is a list."""
    return json.dumps([change.step, change.donor, change.keys])


def explorer(trials: Trials) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """PBT's explore, another draw at each call."""
    calls, rule = count(), trials.sweep.scheduler

    def explore(keys: dict[str, Any]) -> dict[str, Any]:
        assert rule.kind == "pbt"
        random = Random(f"{trials.sweep.run.seed}/pbt/{next(calls)}/{json.dumps(keys)}")
        return mutate(trials.sweep.space, keys, rule, random)

    return explore


def with_threads(trials: Trials) -> Trials:
    """Trials that run in Tune's workers compute with the CPUs they reserve, unless they say otherwise."""
    runtime = trials.config(0).runtime
    if runtime.kind == "ray" or runtime.threads is not None:
        return trials
    threads = math.ceil(trials.sweep.runtime.cpus_per_trial)
    return replace(trials, base=merge(trials.base, {"runtime": {"threads": threads}}))


def demand(trials: Trials) -> dict[str, float]:
    """CPUs and GPUs of one trial: its own process, and where its own runtime is Ray, learners and pools."""
    config, own = trials.config(0), trials.sweep.runtime
    wanted = {"CPU": own.cpus_per_trial, "GPU": own.gpus_per_trial}
    if config.runtime.kind == "ray":
        learners = min(config.runtime.worker_counts)
        wanted["CPU"] += learners * config.runtime.cpus_per_worker
        wanted["GPU"] += learners * config.runtime.gpus_per_worker
        for role in trials.door.pools(config).roles:
            wanted["CPU"] += role.pool.replicas * role.pool.cpus
            wanted["GPU"] += role.pool.replicas * role.pool.gpus
    return wanted
