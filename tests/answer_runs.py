"""Whole trainings of tiny models that answer, from saved tiny models and made-up data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fmray.config.answers import AnswersConfig
from fmray.config.loading import merge, validate
from fmray.models.answering import Answering
from fmray.runtime.run_folder import RunFolder
from tests.dialogues_data import write_llava, write_vqa_v2
from tests.keys import with_keys
from tests.tiny_mllm import tiny_mllm
from tests.tiny_vqa import tiny_vqa


def saved(answering: Answering, folder: Path) -> Path:
    """The model in a folder, as a checkpoint holds it."""
    if not folder.exists():
        weights = {name: value.detach() for name, value in answering.model.state_dict().items()}
        answering.save(weights, folder)
    return folder


def vqa_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """A tiny VQA model on the official layout: 8 pictures with 3 questions each."""
    start = saved(tiny_vqa(), folder / "tiny_vqa")
    return _run(
        folder, {"kind": "vqa", "checkpoint": str(start)}, write_vqa_v2(folder / "vqa_v2"), 4, changes
    )


def mllm_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """A tiny multimodal LLM on conversations, the last of which has no picture."""
    start = saved(tiny_mllm(), folder / "tiny_mllm")
    model = {"kind": "mllm", "checkpoint": str(start), "max_tokens": 256, "max_answer_tokens": 8}
    return _run(folder, model, write_llava(folder / "llava"), 3, changes)


def _run(
    folder: Path, model: dict[str, Any], source: dict[str, Any], batch_size: int, changes: dict[str, Any]
) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "task": "answers",
        "run": {"name": "run", "storage": str(folder / "runs")},
        "runtime": {"threads": 1},
        "report": {"progress": False},
        "data": {"source": source, "batch_size": batch_size},
        "model": model,
        "optimizer": {"lr": 3e-3},
        "train": {"steps": 12},
    }
    return merge(keys, with_keys({}, changes, "__"))


def configured(keys: dict[str, Any]) -> AnswersConfig:
    """The checked configuration."""
    return validate(AnswersConfig, keys)


def write_config(folder: Path, name: str, keys: dict[str, Any]) -> Path:
    """A file for `fmray pretrain --config`."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(merge(keys, {"run": {"name": name}})), encoding="utf-8")
    return path


def losses(folder: Path, name: str) -> list[float]:
    """The training losses of a run."""
    lines = RunFolder(f"{folder}/runs/{name}").metrics()
    return [line["train/loss"] for line in lines if "train/loss" in line]
