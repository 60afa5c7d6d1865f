"""A context without a run: rank r of W on the CPU."""

from __future__ import annotations

import torch

from fmray.runtime.context import WorkerContext
from fmray.runtime.run_folder import RunFolder


def context(rank: int = 0, world_size: int = 1, folder: str = "unused") -> WorkerContext:
    return WorkerContext(rank, world_size, torch.device("cpu"), RunFolder(folder))
