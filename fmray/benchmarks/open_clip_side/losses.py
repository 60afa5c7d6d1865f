"""open_clip's losses on given tensors, on one process and on gloo ranks: `python losses.py IN.safetensors OUT.safetensors`.

Run by the peer environment's Python; nothing of fmray is imported.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torchvision_without_kernels  # noqa: F401 (before open_clip, which imports torchvision)
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn

from open_clip.loss import ClipLoss, SigLipLoss  # isort: skip


def measured(tensors: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """Values and gradients of both losses for this rank's rows."""
    found: dict[str, torch.Tensor] = {}
    rows = len(tensors["image"]) // world
    mine = slice(rank * rows, (rank + 1) * rows)
    for kind in ("infonce", "siglip"):
        leaves = {name: tensors[name][mine].clone().requires_grad_() for name in ("image", "text")}
        leaves |= {name: tensors[name].clone().requires_grad_() for name in ("log_scale", "bias")}
        image, text, scale = leaves["image"], leaves["text"], leaves["log_scale"].exp()
        if kind == "infonce":
            loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)(
                image, text, scale
            )
        else:
            loss = SigLipLoss(rank=rank, world_size=world)(image, text, scale, leaves["bias"])
        loss.backward()
        found[f"{kind}/value"] = loss.detach()
        found |= {f"{kind}/{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {f"{world}/{rank}/{name}": value for name, value in found.items()}


def on_rank(rank: int, world: int, source: str, folder: str) -> None:
    """One gloo process; its findings go to a file."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    save_file(measured(load_file(source), rank, world), Path(folder, f"{rank}.safetensors"))
    torch.distributed.destroy_process_group()


def main(source: str, target: str, world: int = 2) -> None:
    """One process, then `world` ranks, into one file."""
    found = measured(load_file(source), 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        spawn(on_rank, (world, source, folder), nprocs=world)  # type: ignore[no-untyped-call]
        for rank in range(world):
            found |= load_file(Path(folder, f"{rank}.safetensors"))
    save_file({name: value.contiguous() for name, value in found.items()}, target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
