"""Models that answer, trained in one process through the door that users open: saved, resumed, measured, refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fmray.cli import door, evaluate, pretrain
from fmray.config.answers import AnswersConfig
from fmray.data.dialogue_loader import decoded_pictures
from fmray.data.dialogues import open_dialogues
from fmray.models.answering import load_answering
from fmray.runtime.context import WorkerContext
from fmray.runtime.run_folder import RunFolder
from fmray.training.answers import make_learner
from tests.answer_runs import configured, losses, mllm_run, vqa_run, write_config
from tests.processes import assert_bit_equal, start_job, state, wait_for_step

CPU = torch.device("cpu")


def run(folder: Path, name: str, keys: dict[str, Any]) -> list[float]:
    """A whole run; its losses."""
    assert door(pretrain, ["--config", str(write_config(folder, name, keys))]) == 0
    return losses(folder, name)


def write_json(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def near(ours: list[float], theirs: list[float], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) <= tolerance


@pytest.mark.parametrize("make", [vqa_run, mllm_run])
def test_it_learns_saves_measures_and_answers(tmp_path: Path, make: Any) -> None:
    keys = make(tmp_path, train__steps=40)
    curve = run(tmp_path, "run", keys)
    assert curve[-1] < 0.6 * curve[0]
    folder = tmp_path / "runs" / "run"
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["step"] == 40
    assert "Wrong answers" in (folder / "report.html").read_text(encoding="utf-8")
    assert {"eval/exact_match", "eval/question_only", "eval/majority"} <= found["metrics"].keys()
    again = [f"checkpoint={folder}", f"run.storage={tmp_path}/runs", "task=answers", "runtime.threads=1"]
    source = write_json(tmp_path / "source.json", {"data": {"source": keys["data"]["source"]}})
    assert door(evaluate, [*again, "--config", str(source)]) == 0
    measured = json.loads((tmp_path / "runs" / "evaluate" / "evaluation.json").read_text())
    assert measured["metrics"] == found["metrics"]
    answering = load_answering(str(folder), CPU)
    test = open_dialogues(configured(keys).data.source, "test")
    dialogue = test[0]
    pictures = decoded_pictures(test, list(dialogue.pictures), answering.image)
    said = answering.answer([dialogue], pictures)
    assert said[0].text
    assert said == load_answering(str(folder), CPU).answer([dialogue], pictures)


@pytest.mark.slow
@pytest.mark.parametrize("make", [vqa_run, mllm_run])
def test_killed_and_resumed_is_bit_equal(tmp_path: Path, make: Any) -> None:
    """Augmentation, drawn questions, an average of the weights: everything that could remember something."""
    keys = make(
        tmp_path,
        train__steps=40,
        train__checkpoint_every=5,
        optimizer__ema_decay=0.9,
        data__augment={"flip": 0.5, "rotate": 10, "color": 0.2},
        data__questions_per_picture=2,
    )
    whole, config = write_config(tmp_path, "whole", keys), write_config(tmp_path, "killed", keys)
    process = start_job(
        "pretrain", whole
    )  # a process of its own too: what ran before may choose other kernels
    assert process.wait(240) == 0
    process = start_job("pretrain", config)
    wait_for_step(tmp_path, "killed", 12, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    process = start_job("pretrain", config)
    assert process.wait(240) == 0
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")
    assert_bit_equal(state(tmp_path, "killed", 40), state(tmp_path, "whole", 40))


def test_micro_batches_change_no_result(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole", vqa_run(tmp_path))
    near(run(tmp_path, "cut", vqa_run(tmp_path, data__micro_batch_size=1)), whole, 2e-5)


def test_packed_rows_change_no_result(tmp_path: Path) -> None:
    apart = run(tmp_path, "apart", mllm_run(tmp_path))
    near(run(tmp_path, "packed", mllm_run(tmp_path, model__row_tokens=300)), apart, 2e-5)


@pytest.mark.parametrize("make", [vqa_run, mllm_run])
def test_a_locked_towers_features_are_made_once_and_change_nothing(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMRAY_CACHE", str(tmp_path / "cache"))
    locked = {"parts": {"vision": {"train": "none"}}}
    seen = run(tmp_path, "seen", make(tmp_path, **locked, data__cache_features=False))
    assert not (tmp_path / "cache" / "features").exists()
    near(run(tmp_path, "kept", make(tmp_path, **locked)), seen, 2e-6)
    config = configured(make(tmp_path, **locked))
    source = open_dialogues(config.data.source, "train")
    keys = tuple(dict.fromkeys(key for index in range(len(source)) for key in source[index].pictures))
    files = list((tmp_path / "cache" / "features").rglob("*.safetensors"))
    assert len(files) == len(keys)
    files[0].write_bytes(b"cut off")  # as a killed writer leaves it
    features = learner_of(config, tmp_path).features
    assert features is not None
    again = features.pictures(keys)
    assert features.made == 1
    pixels = decoded_pictures(source, list(keys), features.answering.image).pixels_NCHW
    assert pixels is not None
    assert again.features_NPF is not None
    with torch.no_grad():
        now = features.answering.picture_features(pixels)
    torch.testing.assert_close(again.features_NPF, now, atol=1e-6, rtol=1e-5)


def learner_of(config: AnswersConfig, folder: Path) -> Any:
    context = WorkerContext(rank=0, world_size=1, device=CPU, folder=RunFolder(f"{folder}/runs/x"))
    return make_learner(config, open_dialogues(config.data.source, "train"), context)


def test_features_are_of_these_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMRAY_CACHE", str(tmp_path / "cache"))
    locked = {"parts": {"vision": {"train": "none"}}}
    folders = [learner_of(configured(vqa_run(tmp_path, **locked)), tmp_path).features.folder]
    folders.append(learner_of(configured(mllm_run(tmp_path, **locked)), tmp_path).features.folder)
    bf16 = configured(vqa_run(tmp_path, **locked, engine__precision="bf16"))
    folders.append(learner_of(bf16, tmp_path).features.folder)
    assert len(set(folders)) == 3
    moving = configured(vqa_run(tmp_path, **locked, data__augment={"flip": 0.5}))
    assert learner_of(moving, tmp_path).features is None


@pytest.mark.parametrize(
    ("make", "changes", "line"),
    [
        (vqa_run, {"data__source__train_annotations": "nowhere.json"}, "nowhere.json"),
        (vqa_run, {"parts": {"visoin": {"train": "none"}}}, "did you mean vision?"),
        (vqa_run, {"model__freeze": "encoders", "parts": {"text": {"lr": 1e-4}}}, "say it in one place"),
        (vqa_run, {"model__checkpoint": "runs/none"}, "runs/none"),
        (mllm_run, {"model__max_tokens": 24}, "max_tokens"),
        (mllm_run, {"parts": {"vision": {"train": "cross_attention"}}}, "cross_attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_end_in_one_line(
    tmp_path: Path, make: Any, changes: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, "wrong", make(tmp_path, **changes))
    assert door(pretrain, ["--config", str(config)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert line in said


def test_another_kind_of_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = vqa_run(tmp_path, model__checkpoint=str(tmp_path / "tiny_mllm"))
    mllm_run(tmp_path)  # writes it
    assert door(pretrain, ["--config", str(write_config(tmp_path, "wrong", keys))]) == 1
    assert "tiny_mllm" in capsys.readouterr().err
