"""Our losses against open_clip's on the same tensors, on one process and on two gloo ranks: values and gradients."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from fmray.benchmarks.peers import run_peer_script
from fmray.objectives.contrastive import infonce, row_keys, siglip

ROWS, WIDTH, WORLD = 48, 64, 2


def compare_losses(python: Path, folder: Path) -> dict[str, float]:
    """Largest difference of a value or gradient, by loss and number of processes; relative where the largest is above 1."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: F.normalize(torch.randn(ROWS, WIDTH, generator=draw), dim=-1) for name in ("image", "text")
    }
    tensors |= {"log_scale": torch.tensor(2.6592), "bias": torch.tensor(-10.0)}
    given, answer = folder / "losses-in.safetensors", folder / "losses-out.safetensors"
    save_file(tensors, given)
    run_peer_script(python, "open_clip_side/losses.py", str(given), str(answer))
    theirs, ours = load_file(answer), our_losses(given)
    assert theirs.keys() == ours.keys(), "both sides measure the same things"
    worst: dict[str, float] = {}
    for name, value in theirs.items():
        world, _, kind, _ = name.split("/")
        label = f"{kind}, {'1 process' if world == '1' else f'{world} gloo ranks'}"
        size = max(1.0, float(value.abs().max()))
        worst[label] = max(worst.get(label, 0.0), float((value - ours[name]).abs().max()) / size)
    return worst


def our_losses(given: Path) -> dict[str, Tensor]:
    """Values and gradients under `<ranks>/<rank>/<loss>/<what>`."""
    found = measured(load_file(given), 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_on_rank, (WORLD, str(given), folder), nprocs=WORLD)  # type: ignore[no-untyped-call]
        for rank in range(WORLD):
            found |= load_file(Path(folder, f"{rank}.safetensors"))
    return found


def measured(tensors: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """Both losses on this rank's rows."""
    rows = len(tensors["image"]) // world
    mine = slice(rank * rows, (rank + 1) * rows)
    found: dict[str, Tensor] = {}
    for kind in ("infonce", "siglip"):
        leaves = {name: tensors[name][mine].clone().requires_grad_() for name in ("image", "text")}
        leaves |= {name: tensors[name].clone().requires_grad_() for name in ("log_scale", "bias")}
        image, text, scale = leaves["image"], leaves["text"], leaves["log_scale"].exp()
        keys = row_keys(rows, image.device)
        loss = (
            infonce(image, text, scale, keys)
            if kind == "infonce"
            else siglip(image, text, scale, leaves["bias"], keys)
        )
        torch.autograd.backward(loss)
        found[f"{kind}/value"] = loss.detach()
        found |= {f"{kind}/{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {f"{world}/{rank}/{name}": value.contiguous() for name, value in found.items()}


def _on_rank(rank: int, world: int, given: str, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    save_file(measured(load_file(given), rank, world), Path(folder, f"{rank}.safetensors"))
    dist.destroy_process_group()
