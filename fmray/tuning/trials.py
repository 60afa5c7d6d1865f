"""Trials: ordinary runs of a door, each in a folder of its own, whose whole state is on disk.

<storage>/<sweep>/
    config.json          the sweep's configuration
    sweep.json           the table of trials, written as they go
    trial-00000/         a run: config.json, metrics.jsonl, checkpoints/
        trial.json       its keys, how it stands, what it took over from other trials

A trial runs up to a milestone, saves and ends; later it goes on from there. So between two milestones' decisions nothing is
in memory, whoever decides (a loop here, Ray Tune) may be killed, and a trial may go on in another process.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from threading import Event
from typing import Any, Literal

from fmray.config.base import Section
from fmray.config.loading import merge, validate
from fmray.config.sweep import SweepConfig
from fmray.errors import ConfigError, FmrayError
from fmray.manifest import newest_good
from fmray.runtime.context import Outcome
from fmray.runtime.launch import Work, launch
from fmray.runtime.oversight import Oversight
from fmray.runtime.pool import PoolPlan
from fmray.runtime.run_folder import RunFolder
from fmray.tuning.exploit import adopt_checkpoint, step_of
from fmray.tuning.readings import Reading, missing, reading_at
from fmray.tuning.space import nest, sample
from fmray.types import Metrics

TRIAL = "trial.json"
SIGNAL_POLL_SECONDS = 0.2
Status = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]
"""`paused`: will go on; `stopped`: given up by the scheduler. `running` where nothing runs: its process was killed."""


@dataclass(frozen=True, slots=True)
class Door:
    """How a root configuration is run, in one place for every root that can be swept."""

    root: type[Section]
    recipes: Mapping[str, Callable[[], Any]]
    """What a sweep may start from, by name."""
    work: Work
    """Module-level function: it travels to Ray's workers by name."""
    steps: Callable[[Any], int]
    """Steps of a whole run, as its reports count them."""
    pools: Callable[[Any], PoolPlan]
    """Actor pools that a run needs."""
    check: Callable[[Any], None]
    """What can be known to fail before anything starts."""
    may_change: Callable[[Any], tuple[str, ...]]
    """Patterns of keys that may change in the middle of such a run, and then count: what PBT may mutate."""


@dataclass(frozen=True, slots=True)
class Change:
    """A trial that went on from another's checkpoint. `Change(4, "trial-00002", {"optimizer.lr": 0.001})`."""

    step: int
    donor: str
    keys: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """What trial.json says."""

    status: Status
    keys: dict[str, Any]
    """Dotted key → value, as they are now."""
    error: str = ""
    """One line; the traceback is in error.txt beside it."""
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Trials:
    """The trials of a sweep; picklable, since everything else is in their folders."""

    sweep: SweepConfig
    door: Door
    base: dict[str, Any]
    """Nested keys that all trials share."""
    folder: RunFolder

    @property
    def numbers(self) -> range:
        return range(self.sweep.trial_count)

    def name(self, number: int) -> str:
        return f"trial-{number:05d}"

    def number(self, name: str) -> int:
        return int(name.rpartition("-")[2])

    def home(self, number: int) -> RunFolder:
        """The trial's run folder."""
        return RunFolder(f"{self.folder.url}/{self.name(number)}")

    def record(self, number: int) -> TrialRecord:
        """How the trial stands."""
        home = self.home(number)
        if not home.exists(TRIAL):
            return TrialRecord("waiting", sample(self.sweep.space, self.sweep.run.seed, number))
        read = json.loads(home.read_text(TRIAL))
        return TrialRecord(**{**read, "changes": tuple(Change(**change) for change in read["changes"])})

    def write(self, number: int, record: TrialRecord) -> None:
        """Replace trial.json."""
        self.home(number).write_text(json.dumps(asdict(record), indent=1) + "\n", TRIAL)

    def config(self, number: int) -> Any:
        """The trial's configuration, checked; raises ConfigError."""
        run = {"name": self.name(number), "storage": self.folder.url, "fresh": False}
        report = {**self.sweep.report.model_dump(), "progress": False}
        keys = merge(self.base, nest(self.record(number).keys))
        return validate(self.door.root, merge(keys, {"run": run, "report": report}))

    def milestones(self) -> list[int]:
        """Steps at which the scheduler decides, before the last one."""
        rule, total = self.sweep.scheduler, self.door.steps(self.config(0))
        if rule.kind == "pbt":
            return list(range(rule.interval, total, rule.interval))
        rungs = []
        if rule.kind == "asha":
            rung = rule.grace
            while rung < total:
                rungs.append(rung)
                rung *= rule.reduction
        return rungs

    def reading(self, number: int, step: int | None = None) -> Reading | None:
        """The trial's first reading at or after a step; None: its last one."""
        return reading_at(self.home(number).metrics(), self.sweep.metric, step)

    def advance(self, number: int, milestone: int | None, stop: Callable[[], bool]) -> Reading | None:
        """Let a trial run to its first reading at or after the milestone (None: to its end), save and end there.

        Returns that reading, from the disk where the trial is there already; None where the trial failed (its record says
        why), was given up before, or `stop()` ended it first.
        """
        reading, before = self.reading(number, milestone), self.record(number)
        if before.status == "failed":
            return None
        if before.status in ("stopped", "finished") or (
            milestone is not None and self._is_at(number, reading)
        ):
            return reading
        if stop():
            return None
        self.write(number, replace(before, status="running", error=""))
        after = self._run(number, milestone, stop, before)
        reading = self.reading(number, milestone)
        if after.status == "finished" and reading is None:
            cure = (
                "never reported; take a metric of its metrics.jsonl, or evaluate (base.train.evaluate_every)"
            )
            after = replace(after, status="failed", error=f"{self.sweep.metric} was {cure}")
        elif reading is not None and (unknown := missing(reading, self.sweep)):
            cure = f"not reported by step {reading.step}, though constraints name it"
            after = replace(after, status="failed", error=f"{unknown[0]} was {cure}")
        self.write(number, after)
        there = after.status == "finished" or (after.status == "paused" and milestone is not None)
        return reading if there else None

    def _is_at(self, number: int, reading: Reading | None) -> bool:
        """Whether the trial has this reading behind it, and its checkpoint too (which a killed one may lack)."""
        if reading is None or self.record(number).status != "running":
            return reading is not None
        home = self.home(number)
        saved, _ = newest_good(home.filesystem, home.path("checkpoints"))
        return saved is not None and step_of(saved) >= reading.step

    def _run(
        self, number: int, milestone: int | None, stop: Callable[[], bool], before: TrialRecord
    ) -> TrialRecord:
        """The run itself, in a thread: whatever it raises becomes the trial's error, and signals stay the sweep's."""
        reached = Event()

        def tell(step: int, metrics: Metrics) -> None:
            if milestone is not None and step >= milestone and self.sweep.metric in metrics:
                reached.set()

        oversight = Oversight(tell, lambda: reached.is_set() or stop(), tuple(self.sweep.space))
        with ThreadPoolExecutor(1, thread_name_prefix=self.name(number)) as thread:
            running = thread.submit(self._launch, number, oversight)
            while not wait([running], timeout=SIGNAL_POLL_SECONDS).done:
                pass  # a signal's handler runs in the main thread, between two waits
            error = running.exception()
        if error is not None:
            self.home(number).write_text("".join(traceback.format_exception(error)), "error.txt")
            return replace(before, status="failed", error=one_line(error))
        return replace(before, status="finished" if running.result().finished else "paused", error="")

    def _launch(self, number: int, oversight: Oversight) -> Outcome:
        config = self.config(number)
        return launch(self.door.work, config, pools=self.door.pools(config), oversight=oversight)

    def give_up(self, number: int) -> None:
        """The scheduler has no more time for this trial."""
        self.write(number, replace(self.record(number), status="stopped"))

    def fail(self, number: int, error: str) -> None:
        """The trial ended without being able to say so itself."""
        self.write(number, replace(self.record(number), status="failed", error=error))

    def adopt(self, number: int, change: Change) -> None:
        """Go on from the donor's checkpoint with the changed keys; or from its own, as before, where the donor is at its end.

        Raises CheckpointError where the donor has no checkpoint.
        """
        record, total = self.record(number), self.door.steps(self.config(number))
        donor = RunFolder(f"{self.folder.url}/{change.donor}")
        if adopt_checkpoint(donor, self.home(number), change.step, before=total):
            changes = (*record.changes, change)
            self.write(number, TrialRecord("paused", dict(change.keys), changes=changes))

    def check(self) -> None:
        """Refuse what cannot work before the first trial starts: raises ConfigError, and what the door's own check raises."""
        configs = [self.config(number) for number in self.numbers]
        self.door.check(configs[0])
        self._check_scheduler(configs[0])

    def forgive(self) -> None:
        """A trial that failed at an earlier time is tried again."""
        for number in self.numbers:
            if self.record(number).status == "failed":
                self.write(number, replace(self.record(number), status="paused", error=""))

    def _check_scheduler(self, config: Any) -> None:
        rule = self.sweep.scheduler
        if rule.kind == "none":
            return
        step, every = (rule.interval, "interval") if rule.kind == "pbt" else (rule.grace, "grace")
        evaluated = config.train.evaluate_every
        if self.sweep.metric.startswith("eval/") and (evaluated is None or step % evaluated):
            cure = f"the scheduler needs {self.sweep.metric} at its decisions: take a divisor of scheduler.{every}={step}"
            raise ConfigError("base.train.evaluate_every", evaluated, cure)
        patterns = self.door.may_change(config)
        for key in self.sweep.space if rule.kind == "pbt" else ():
            if not any(fnmatch(key, pattern) for pattern in patterns):
                cure = f"pbt changes keys in the middle of a run; there only {', '.join(patterns)} may"
                raise ConfigError("space", key, cure)


def one_line(error: BaseException) -> str:
    """An error as one line: fmray's own are written for people, others get their class in front, tracebacks their last line."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    inner = any(line.startswith("Traceback") for line in lines)
    text = (lines[-1] if inner else " ".join(lines)) if lines else type(error).__name__
    text = text if isinstance(error, FmrayError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 500 else text[:499] + "…"


def keys_text(keys: Mapping[str, Any]) -> str:
    """`optimizer.lr=0.001, objective.kind=siglip`."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in keys.items()
    )
