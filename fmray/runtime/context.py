"""Who am I of how many, where do I report, where do checkpoints go: the one thing a room knows of where it runs."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fmray.config.schema import RuntimeConfig
from fmray.errors import ResourceError
from fmray.runtime.metrics import ShowsSamples
from fmray.runtime.pool import LocalPools, PoolPlan, Pools
from fmray.runtime.run_folder import RunFolder
from fmray.types import Metrics


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `Outcome(steps=200, finished=True)`; not finished: it was told to stop, and has saved."""

    steps: int
    finished: bool


class Context(Protocol):
    """Rank `rank` of `world_size` on `device`; the same calls, in the same order, on every rank."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def folder(self) -> RunFolder:
        """The run's folder, shared by all ranks."""
        ...

    @property
    def pools(self) -> Pools:
        """The run's actor pools, as this rank asks them."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Every rank's rows, in the order of ranks; equal shapes [N, …] in, [world_size·N, …] out; no gradient."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        ...

    def gather_texts(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def report(self, step: int, metrics: Metrics) -> None:
        """Tell the reporters; rank 0's numbers count, every rank calls."""
        ...

    def show_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Tell the reporters that take texts; rank 0's rows count."""
        ...

    def stop_requested(self) -> bool:
        """Whether the run should save and end; the same answer on every rank."""
        ...


@dataclass
class WorkerContext:
    """The context of one learner: torch.distributed where there are several, plain calls where there is one."""

    rank: int
    world_size: int
    device: torch.device
    folder: RunFolder
    pools: Pools = field(default_factory=lambda: LocalPools(PoolPlan(), torch.device("cpu")))
    reporters: list[Callable[[int, Metrics], None]] = field(default_factory=list)
    stop_flag: Callable[[], bool] = lambda: False

    def gather(self, rows: Tensor) -> Tensor:
        if self.world_size == 1:
            return rows
        parts = [
            torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.world_size)
        ]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def sum(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gather_texts(self, text: str) -> list[str]:
        if self.world_size == 1:
            return [text]
        texts: list[str] = [""] * self.world_size
        dist.all_gather_object(texts, text)
        return texts

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def report(self, step: int, metrics: Metrics) -> None:
        for tell in self.reporters:
            tell(step, metrics)

    def show_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        if self.rank == 0 and rows:
            for tell in self.reporters:
                if isinstance(tell, ShowsSamples):
                    tell.show_samples(step, rows)

    def stop_requested(self) -> bool:
        asked = torch.tensor([float(self.rank == 0 and self.stop_flag())], device=self.device)
        return bool(self.sum(asked).item() > 0)


def choose_device(asked: str, local_rank: int = 0) -> torch.device:
    """`auto` goes by what torch sees; asking for a GPU that is not there is a `ResourceError`."""
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and not seen:
        raise ResourceError("runtime.device=cuda, but torch sees no GPU here; use runtime.device=auto or cpu")
    if asked == "cpu" or not seen:
        return torch.device("cpu")
    return torch.device("cuda", local_rank % seen)


def threads_per_worker(runtime: RuntimeConfig) -> int:
    """Torch threads of each worker, said explicitly so that local and Ray runs compare equal."""
    return runtime.threads or max(1, (os.cpu_count() or 1) // max(runtime.worker_counts))


MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8
"""Numbers of malloc.h's M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX."""


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: a gradient as large as a vocabulary would else be mapped and zeroed anew at every step.

    A tenth of a small model's step on a CPU; the highest use of memory stays the same, what is held between peaks grows.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (ARENA_MAX, 1)):
        library.mallopt(option, value)


def prepare_process(runtime: RuntimeConfig) -> None:
    """Threads, memory, and libraries that talk less, for a process that computes."""
    from transformers.utils import logging as transformers_logging

    keep_freed_memory()

    torch.set_num_threads(threads_per_worker(runtime))
    transformers_logging.disable_progress_bar()  # ours is the one that people watch
    transformers_logging.set_verbosity_error()  # what it would say of loading, our errors say
    logging.captureWarnings(True)


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and SIGINT set a flag instead of killing; yields the flag. A second signal kills as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # handlers can be set in the main thread alone; a Ray worker is told through its run folder
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _frame: object) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
