"""Models that answer, trained on Ray: the curve of one process, whatever the workers and the engine; a rank without a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fmray.data.dialogue_loader import DialogueDataset, DialogueLoader
from fmray.data.dialogues import open_dialogues
from fmray.models.answering import load_answering
from fmray.runtime.launch import launch
from fmray.training.answers import train_answers
from tests.answer_runs import configured, losses, mllm_run, vqa_run
from tests.processes import state

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

ON_RAY: dict[str, Any] = {
    "runtime__kind": "ray",
    "runtime__workers": 2,
    "engine__kind": "deepspeed",
}


def assert_one_curve(folder: Path, names: list[str]) -> None:
    """The losses to 1e-4, and the weights after the last step to 2e-4."""
    reference, weights = losses(folder, names[0]), state(folder, names[0], 12)
    for name in names[1:]:
        curve = losses(folder, name)
        worst = max(abs(a - b) / b for a, b in zip(curve, reference, strict=True))
        assert worst <= 1e-4, f"{name}: {worst:.1e}"
        there = state(folder, name, 12)
        assert there.keys() == weights.keys()
        far = {key: float((there[key] - weights[key]).abs().max()) for key in weights}
        assert max(far.values()) <= 2e-4, f"{name}: {max(far, key=lambda key: far[key])}"


def test_vqa_under_zero_2_and_3_is_one_curve(ray_session: None, tmp_path: Path) -> None:
    launch(train_answers, configured(vqa_run(tmp_path, run__name="local")))
    for stage in (2, 3):
        keys = vqa_run(tmp_path, run__name=f"zero{stage}", engine__zero_stage=stage, **ON_RAY)
        launch(train_answers, configured(keys))
    assert_one_curve(tmp_path, ["local", "zero2", "zero3"])


def test_a_rank_without_a_picture_neither_hangs_nor_changes_a_gradient_under_zero_3(
    ray_session: None, tmp_path: Path
) -> None:
    batch = {"data__batch_size": 2, "optimizer__eps": 1e-4}  # Adam divides by the tower's tiny gradients
    local = configured(mllm_run(tmp_path, run__name="local", **batch))
    launch(train_answers, local)
    launch(
        train_answers,
        configured(mllm_run(tmp_path, run__name="zero3", engine__zero_stage=3, **ON_RAY, **batch)),
    )
    assert_one_curve(tmp_path, ["local", "zero3"])
    # it did happen: on some step a rank had the text alone while the other had a picture
    source = open_dialogues(local.data.source, "train")
    image = load_answering(str(tmp_path / "runs" / "zero3"), torch.device("cpu")).image
    dataset = DialogueDataset(source, local.data, image, local.run.seed)
    ranks = [dict(DialogueLoader(dataset, rank, 2).batches(0, 12)) for rank in range(2)]
    bare = [[not ranks[rank][step].pictures.keys for step in range(12)] for rank in range(2)]
    assert any(a != b for a, b in zip(*bare, strict=True))
