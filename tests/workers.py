"""Run one function on several gloo ranks, as processes of this test, and return what each rank returned."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_workers(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(rank, world_size, *arguments)` on every rank; a rank's exception fails the test with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_worker, args=(rank, world_size, folder, work, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        hung = [process.pid for process in processes if process.is_alive()]
        for process in processes:
            if process.is_alive():
                process.kill()
        results = [Path(folder, f"{rank}.pt") for rank in range(world_size)]
        loaded = [torch.load(path, weights_only=False) if path.exists() else "died" for path in results]
        failures = [result for result in loaded if isinstance(result, str)]
        assert not failures, "\n".join(failures)
        assert not hung, f"processes {hung} hung"
        return [result["value"] for result in loaded]


def _worker(
    rank: int, world_size: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        result: Any = {"value": work(rank, world_size, *arguments)}
    except BaseException:  # the test process shows it
        result = f"rank {rank}:\n{traceback.format_exc()}"
    torch.save(result, f"{folder}/{rank}.draft")
    Path(folder, f"{rank}.draft").rename(f"{folder}/{rank}.pt")
    if not isinstance(result, str):
        dist.barrier()
    dist.destroy_process_group()
