"""Saved models that are damaged on disk: an endpoint does not start with them, and says in one line why."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmray.config.serving import ServeConfig
from fmray.errors import CheckpointError
from fmray.serving.opening import Endpoint

WEIGHTS = "model.safetensors"


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def missing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 1000)


def pickled(folder: Path) -> None:
    """What torch.load would run as a program."""
    tensors = load_file(folder / WEIGHTS)
    missing(folder)
    torch.save(tensors, folder / "pytorch_model.bin")


def of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    saved(folder, {**tensors, sorted(tensors)[3]: torch.zeros(3, 7)})


def not_numbers(folder: Path) -> None:
    saved(
        folder,
        {name: torch.full_like(tensor, math.nan) for name, tensor in load_file(folder / WEIGHTS).items()},
    )


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(sorted(tensors)[3])
    saved(folder, tensors)


def without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    missing: "holds no model",
    empty: "cannot be loaded: ",
    cut: "cannot be loaded: ",
    garbage: "cannot be loaded: ",
    pickled: "holds no model",
    of_another_shape: "cannot be loaded: ",
    not_numbers: "are not finite: its weights are damaged",
    without_a_tokenizer: "cannot be loaded: ",
    without_a_tensor: "lacks weights of the model: ",
}


@pytest.mark.parametrize("kind", ["clip", "vqa", "mllm"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_it_does_not_start(
    damage: Callable[[Path], None], kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue("checkpoint" if kind == "clip" else f"{kind}_checkpoint")
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        Endpoint(ServeConfig(checkpoint=str(folder)))
    assert DAMAGES[damage] in str(caught.value)
    assert "\n" not in str(caught.value)
