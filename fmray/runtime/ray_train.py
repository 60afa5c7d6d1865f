"""The Ray Train door: the same work on a group of workers, one rank each. Imports ray; knows no room.

The driver (the process that was started) only watches: it draws progress from the run's metrics.jsonl, and on SIGTERM
leaves a `stop` file in the run folder, which rank 0 sees and all ranks agree on. Checkpoints are the work's own and live in
the run folder, so a worker group that Ray restarts, smaller or larger, resumes from there.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fmray.config.schema import RuntimeConfig
from fmray.errors import FmrayError, MissingExtra, ResourceError
from fmray.runtime.context import (
    Context,
    Outcome,
    WorkerContext,
    choose_device,
    prepare_process,
    stop_on_sigterm,
)
from fmray.runtime.metrics import EVALUATION, METRICS, ProgressBar, make_reporters, prometheus_name
from fmray.runtime.run_folder import RunFolder
from fmray.types import Metrics

try:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError
    from ray.util.metrics import Gauge
except ImportError:
    raise MissingExtra("ray", "ray", "runtime.kind=ray") from None

log = logging.getLogger(__name__)

OUTCOME = "outcome.json"
STOP_POLL_SECONDS = 0.5


def run_on_ray(
    work: Callable[[Any, Context], Outcome], config: Any, folder: RunFolder, steps: int
) -> Outcome:
    """Run the work on `config.runtime.workers` ranks; raises what a rank raised, or ResourceError before it starts."""
    with connected(config.runtime):
        runtime: RuntimeConfig = config.runtime
        require_resources(runtime)
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


@contextmanager
def connected(runtime: RuntimeConfig) -> Iterator[None]:
    """A Ray to work on: the one this process is in already, the one at `runtime.address`, or a new one on this machine."""
    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    try:
        if runtime.address or os.environ.get("RAY_ADDRESS"):
            ray.init(address=runtime.address or "auto", **quiet)
        else:
            # the dashboard stays on: without it Ray Train prints a failed query every few seconds
            ray.init(num_cpus=os.cpu_count(), include_dashboard=True, **quiet)
    except ConnectionError as error:
        raise ResourceError(
            f"runtime.address={runtime.address!r}: no Ray cluster answers there ({str(error).splitlines()[0]})"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def require_resources(runtime: RuntimeConfig) -> None:
    """Refuse, before anything starts, what the cluster as it stands can never hold."""
    has = ray.cluster_resources()
    count = min(runtime.worker_counts)
    for name, each in _resources(runtime).items():
        if each * count > has.get(name, 0):
            raise ResourceError(
                f"runtime.workers={count} with {each:g} {name} each need {each * count:g} {name}, "
                f"but the cluster has {has.get(name, 0):g}: lower runtime.workers or runtime.{name.lower()}s_per_worker"
            )


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
