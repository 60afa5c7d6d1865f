"""The Ray Train door: the same work on a group of workers, one rank each. Imports ray; knows no room.

The driver (the process that was started) only watches: it draws progress from the run's metrics.jsonl, and on SIGTERM
leaves a `stop` file in the run folder, which rank 0 sees and all ranks agree on. Checkpoints are the work's own and live in
the run folder, so a worker group that Ray restarts, smaller or larger, resumes from there.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.metrics import Gauge

from fmray.config.schema import RuntimeConfig
from fmray.errors import FmrayError
from fmray.runtime.context import (
    Context,
    Outcome,
    WorkerContext,
    choose_device,
    prepare_process,
    stop_on_sigterm,
)
from fmray.runtime.metrics import EVALUATION, METRICS, ProgressBar, make_reporters, prometheus_name
from fmray.runtime.pool import PoolPlan
from fmray.runtime.ray_cluster import connected, require_resources
from fmray.runtime.run_folder import RunFolder
from fmray.types import Metrics

log = logging.getLogger(__name__)

OUTCOME = "outcome.json"
STOP_POLL_SECONDS = 0.5


def run_on_ray(
    work: Callable[[Any, Context], Outcome],
    config: Any,
    folder: RunFolder,
    steps: int,
    plan: PoolPlan,
) -> Outcome:
    """Run the work on `config.runtime.workers` ranks; raises what a rank raised, or ResourceError before it starts."""
    runtime: RuntimeConfig = config.runtime
    with connected(runtime.address):
        count = min(runtime.worker_counts)
        wanted = {name: each * count for name, each in _resources(runtime).items()}
        cure = "lower runtime.workers, runtime.cpus_per_worker or runtime.gpus_per_worker"
        require_resources(wanted, f"runtime.workers={count}", cure)
        folder.remove(OUTCOME)
        trainer = TorchTrainer(
            _rank,
            train_loop_config={"work": work, "config": config, "folder": folder},
            torch_config=TorchConfig(backend="nccl" if runtime.gpus_per_worker >= 1 else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=runtime.workers,
                use_gpu=runtime.gpus_per_worker > 0,
                resources_per_worker=_resources(runtime),
            ),
            run_config=ray.train.RunConfig(
                name=config.run.name,
                storage_path=folder.url.rpartition("/")[0],
                failure_config=ray.train.FailureConfig(max_failures=runtime.max_failures),
                worker_runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
            ),
        )
        with watching(folder, config, steps):
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise _cause(error, folder) from None
    told = json.loads(folder.read_text(OUTCOME))
    return Outcome(**told)


def _resources(runtime: RuntimeConfig) -> dict[str, float]:
    wanted = {"CPU": runtime.cpus_per_worker}
    return wanted | {"GPU": runtime.gpus_per_worker} if runtime.gpus_per_worker else wanted


# ------------------------------------------------------------------------------------------------------------ on a worker


def _rank(loop: dict[str, Any]) -> None:
    """What each worker runs."""
    config, folder = loop["config"], loop["folder"]
    here = ray.train.get_context()
    rank, world_size = here.get_world_rank(), here.get_world_size()
    prepare_process(config.runtime)
    reporters = [_train_reporter()]
    if rank == 0:
        reporters += [*make_reporters(config.report, folder, config.run.name), _prometheus_reporter(config)]
    context = WorkerContext(
        rank=rank,
        world_size=world_size,
        device=choose_device(config.runtime.device, here.get_local_rank()),
        folder=folder,
        reporters=reporters,
        stop_flag=_stop_file(folder),
    )
    try:
        outcome = loop["work"](config, context)
    except FmrayError as error:
        folder.write_text(str(error), f"error-rank-{rank}.txt")
        raise
    if rank == 0:
        folder.write_text(json.dumps({"steps": outcome.steps, "finished": outcome.finished}), OUTCOME)


def _train_reporter() -> Callable[[int, Metrics], None]:
    """Ray Train's own report, of evaluations alone: each call waits for the controller's next poll, two seconds.

    Every rank calls it equally often, as it must; checkpoints are ours.
    """

    def tell(step: int, metrics: Metrics) -> None:
        if any(name.startswith(EVALUATION) for name in metrics):
            ray.train.report({"step": step, **metrics})

    return tell


def _prometheus_reporter(config: Any) -> Callable[[int, Metrics], None]:
    """Gauges of the same names as local mode's, through Ray's exporter (which prefixes `ray_`)."""
    tags = {"run": config.run.name}
    gauges = {name: Gauge(prometheus_name(name), doc, ("run",)) for name, doc in METRICS.items()}
    evaluation = Gauge("fmray_eval", "A measure of the last evaluation.", ("run", "metric"))
    steps = Gauge("fmray_step", "Optimizer steps done.", ("run",))

    def tell(step: int, metrics: Metrics) -> None:
        steps.set(step, tags)
        for name, value in metrics.items():
            if name.startswith(EVALUATION):
                evaluation.set(value, tags | {"metric": name.removeprefix(EVALUATION)})
            else:
                gauges[name].set(value, tags)

    return tell


def _stop_file(folder: RunFolder) -> Callable[[], bool]:
    """Whether the driver asked to stop; looks at the storage at most twice a second."""
    seen = {"at": 0.0, "asked": False}

    def asked() -> bool:
        now = time.monotonic()
        if not seen["asked"] and now - seen["at"] >= STOP_POLL_SECONDS:
            seen["at"], seen["asked"] = now, folder.exists("stop")
        return bool(seen["asked"])

    return asked


# ---------------------------------------------------------------------------------------------------------- on the driver


@contextmanager
def watching(folder: RunFolder, config: Any, steps: int) -> Iterator[None]:
    """Draw progress and pass SIGTERM on, while the workers work."""
    ended = threading.Event()
    bar = ProgressBar(steps, config.run.name) if config.report.progress and steps else None
    with stop_on_sigterm() as asked:
        thread = threading.Thread(target=_follow, args=(folder, bar, asked, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if bar is not None:
                bar.close()


def _follow(
    folder: RunFolder, bar: ProgressBar | None, asked: Callable[[], bool], ended: threading.Event
) -> None:
    seen, told = len(folder.metrics()), False
    while True:
        over = ended.wait(0.5)
        if asked() and not told:
            folder.write_text("asked by a signal to the driver\n", "stop")
            told = True
        lines = folder.metrics()
        for line in lines[min(seen, len(lines)) :]:  # a restarted group cuts lines off
            if bar is not None:
                bar(int(line["step"]), {k: v for k, v in line.items() if k not in ("step", "time")})
        seen = len(lines)
        if over:
            return


def _cause(error: Exception, folder: RunFolder) -> Exception:
    """The fmray error that a rank ended with, if there was one: a person's mistake ends in one line."""
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, FmrayError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    return error
