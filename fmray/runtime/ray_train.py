"""The Ray Train door: the same work on a group of workers, one rank each. Imports ray; knows no room.

The driver (the process that was started) only watches: it draws progress from the run's metrics.jsonl, and on SIGTERM
leaves a `stop` file in the run folder, which rank 0 sees and all ranks agree on. Checkpoints are the work's own and live in
the run folder, so a worker group that Ray restarts, smaller or larger, resumes from there.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from fmray.runtime.metrics import (
    EVALUATION,
    FAMILIES,
    METRICS,
    ProgressBar,
    Reporter,
    family_of,
    make_reporters,
    prometheus_name,
)
from fmray.runtime.oversight import NO_OVERSIGHT, Oversight, stop_file
from fmray.runtime.pool import PoolPlan
from fmray.runtime.ray_cluster import connected, require_resources
from fmray.runtime.ray_pools import pool_resources, running_pools
from fmray.runtime.run_folder import RunFolder
from fmray.types import Metrics

log = logging.getLogger(__name__)

OUTCOME = "outcome.json"


def run_on_ray(
    work: Callable[[Any, Context], Outcome],
    config: Any,
    folder: RunFolder,
    steps: int,
    plan: PoolPlan,
    oversight: Oversight = NO_OVERSIGHT,
) -> Outcome:
    """Run the work on `config.runtime.workers` ranks beside the plan's pools.

    Raises what a rank raised, ResourceError before anything starts, or what kept a pool from being ready.
    """
    runtime: RuntimeConfig = config.runtime
    with connected(runtime.address), ExitStack() as stack:
        _require(runtime, plan)
        folder.remove(OUTCOME)
        pools = stack.enter_context(running_pools(plan))
        trainer = TorchTrainer(
            _rank,
            train_loop_config={"work": work, "config": config, "folder": folder, "pools": pools},
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
        with watching(folder, config, steps, oversight):
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise _cause(error, folder) from None
    told = json.loads(folder.read_text(OUTCOME))
    return Outcome(**told)


def _require(runtime: RuntimeConfig, plan: PoolPlan) -> None:
    """Refuse what the learners and the pools can never have together."""
    count, pools = min(runtime.worker_counts), pool_resources(plan)
    wanted = Counter({name: each * count for name, each in _resources(runtime).items()})
    wanted.update(pools)
    what = f"runtime.workers={count}"
    cure = "lower runtime.workers, runtime.cpus_per_worker or runtime.gpus_per_worker"
    if pools:
        what += " and the pools " + ", ".join(f"{spec.name}×{spec.pool.replicas}" for spec in plan.roles)
        cure += ", or the pools' replicas, cpus, gpus or resources"
    require_resources(dict(wanted), what, cure)


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
    device = choose_device(config.runtime.device, here.get_local_rank())
    context = WorkerContext(
        rank=rank,
        world_size=world_size,
        device=device,
        folder=folder,
        pools=loop["pools"].client(device, rank, world_size),
        reporters=reporters,
        stop_flag=stop_file(folder),
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
    families = {prefix: Gauge(name, doc, ("run", "metric")) for prefix, (name, doc) in FAMILIES.items()}
    steps = Gauge("fmray_step", "Optimizer steps done.", ("run",))

    def tell(step: int, metrics: Metrics) -> None:
        steps.set(step, tags)
        for name, value in metrics.items():
            if (family := family_of(name)) is not None:
                families[family].set(value, tags | {"metric": name.removeprefix(family)})
            else:
                gauges[name].set(value, tags)

    return tell


# ---------------------------------------------------------------------------------------------------------- on the driver


@contextmanager
def watching(
    folder: RunFolder, config: Any, steps: int, oversight: Oversight = NO_OVERSIGHT
) -> Iterator[None]:
    """Draw progress, pass reports to the overseer and SIGTERM to the workers, while they work."""
    ended = threading.Event()
    bar = ProgressBar(steps, config.run.name) if config.report.progress and steps else None
    listeners = [oversight.tell, *([bar] if bar is not None else [])]
    with stop_on_sigterm() as asked:
        asks = (asked, oversight.stop)
        thread = threading.Thread(target=_follow, args=(folder, listeners, asks, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if bar is not None:
                bar.close()


def _follow(
    folder: RunFolder,
    listeners: Sequence[Reporter],
    asks: Sequence[Callable[[], bool]],
    ended: threading.Event,
) -> None:
    seen, told = len(folder.metrics()), False
    while True:
        over = ended.wait(0.5)
        lines = folder.metrics()
        for line in lines[min(seen, len(lines)) :]:  # a restarted group cuts lines off
            metrics = {name: value for name, value in line.items() if name not in ("step", "time")}
            for tell in listeners:
                tell(int(line["step"]), metrics)
        seen = len(lines)
        if not told and any(ask() for ask in asks):
            folder.write_text("asked by the driver\n", "stop")
            told = True
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
