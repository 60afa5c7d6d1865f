"""Whole trainings of reward models: each kind of verdict, killing, resuming, stopping, trl's trainer, Ray, one-line errors."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fmray.cli import door, reward
from fmray.errors import TEMPORARY_FAILURE
from fmray.models.reward_model import load_reward_model
from fmray.runtime.run_folder import RunFolder
from tests.opinions import write_opinion_config
from tests.processes import assert_bit_equal, finish, start_job, state, wait_for_step
from tests.stories import tiny_gpt2, tiny_t5

CLOCKS = ("time", "time/step", "time/evaluate", "train/samples_per_second", "train/tokens_per_second")


def lines(folder: Path, name: str, prefix: str = "train/") -> list[dict[str, Any]]:
    """Reports without clocks."""
    reports = RunFolder(f"{folder}/runs/{name}").metrics()
    chosen = [report for report in reports if any(key.startswith(prefix) for key in report)]
    return [{key: value for key, value in report.items() if key not in CLOCKS} for report in chosen]


def evaluation(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / name / "evaluation.json").read_text())
    return found


def pretrained(folder: Path, family: str) -> dict[str, Any]:
    source = folder / family
    if not source.exists():
        {"gpt2": tiny_gpt2, "t5": tiny_t5}[family](source)
    keys = {"source": str(source), "tokenizer": None, "pretrained": True, "overrides": {}}
    return {f"model__{key}": value for key, value in keys.items()}


def run(config: Path, *overrides: str) -> int:
    return door(reward, ["--config", str(config), *overrides])


# ------------------------------------------------------------------------------------------------ each kind of verdict


@pytest.mark.parametrize("kind", ["labelled", "pairs", "rankings"])
def test_an_encoder_learns_and_says_how_far_it_can_be_trusted(tmp_path: Path, kind: str) -> None:
    steps = 150 if kind == "labelled" else 60
    config = write_opinion_config(tmp_path, kind, kind, train__steps=steps, train__evaluate_every=steps // 2)
    assert run(config) == 0
    reports, measured = lines(tmp_path, kind), lines(tmp_path, kind, "eval/")
    assert [report["step"] for report in reports] == list(range(1, steps + 1))
    assert [report["step"] for report in measured] == [steps // 2, steps]
    assert measured[-1]["eval/test/accuracy"] >= 0.8
    found = evaluation(tmp_path, kind)
    for part in ("test", "test_few"):
        for name in ("accuracy", "calibration_error", "brier", "log_loss"):
            assert found["metrics"][f"eval/{part}/{name}"] == measured[-1][f"eval/{part}/{name}"]
        table = found["by_confidence"][part]
        accuracy = sum(row["count"] * row["accuracy"] for row in table) / sum(row["count"] for row in table)
        assert accuracy == pytest.approx(found["metrics"][f"eval/{part}/accuracy"])
    baseline = {"labelled": "commonest_label"}.get(kind, "by_length_alone")
    assert 0.5 <= found["metrics"][f"eval/test/{baseline}"] <= 1.0
    assert (found["normalisation"]["gain"] is None) == (kind == "labelled")


@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_an_encoder_decoder_learns(tmp_path: Path, kind: str) -> None:
    config = write_opinion_config(tmp_path, kind, kind, train__steps=25, **pretrained(tmp_path, "t5"))
    assert run(config) == 0
    assert evaluation(tmp_path, kind)["metrics"]["eval/test/accuracy"] >= 0.9
    loaded = load_reward_model(str(tmp_path / "runs" / kind), torch.device("cpu"))
    assert type(loaded.model).__name__ == "T5ForSequenceClassification"


def test_plackett_luce_and_low_precision(tmp_path: Path) -> None:
    keys = {"objective__kind": "plackett_luce", "engine__precision": "bf16", "optimizer__ema_decay": 0.9}
    config = write_opinion_config(tmp_path, "luce", "rankings", train__steps=60, **keys)
    assert run(config) == 0
    reports = lines(tmp_path, "luce")
    assert reports[-1]["train/loss"] < 0.7 * reports[0]["train/loss"]


@pytest.mark.assets
def test_the_tiny_recipe(tmp_path: Path) -> None:
    storage = f"run.storage={tmp_path}/runs"
    quick = ["train.steps=4", "runtime.threads=1", "report.progress=false", "evaluate.max_samples=16"]
    assert door(reward, ["--recipe", "reward_tiny", storage, *quick]) == 0
    found = evaluation(tmp_path, "reward_tiny")
    assert {name.split("/")[1] for name in found["metrics"]} == {"rotten_tomatoes", "continuations", "imdb"}
    loaded = load_reward_model(str(tmp_path / "runs" / "reward_tiny"), torch.device("cpu"))
    assert loaded.labels == ("negative", "positive")


# ---------------------------------------------------------------------------------------------- killed, stopped, resumed


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(tmp_path: Path) -> None:
    """Dropout, an average, micro-batches, epochs that end inside windows: everything that could remember something."""
    noisy: dict[str, Any] = {
        "train__steps": 120,
        "train__checkpoint_every": 7,
        "optimizer__ema_decay": 0.9,
        "model__dropout": 0.1,
        "data__micro_batch_size": 2,
    }
    # processes of their own on both sides: what ran before in this one may choose other kernels, which round otherwise
    finish(start_job("reward", write_opinion_config(tmp_path, "whole", "rankings", **noisy)))
    config = write_opinion_config(tmp_path, "killed", "rankings", **noisy)
    process = start_job("reward", config)
    wait_for_step(tmp_path, "killed", 16, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(lines(tmp_path, "killed")) < 120
    finish(start_job("reward", config))
    assert lines(tmp_path, "killed") == lines(tmp_path, "whole")
    assert lines(tmp_path, "killed", "eval/") == lines(tmp_path, "whole", "eval/")
    assert_bit_equal(state(tmp_path, "killed", 120), state(tmp_path, "whole", 120))
    assert evaluation(tmp_path, "killed") == evaluation(tmp_path, "whole")


def test_a_run_told_to_stop_saves_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(write_opinion_config(tmp_path, "whole", "pairs", train__steps=12)) == 0
    config = write_opinion_config(tmp_path, "stopped", "pairs", train__steps=12)
    stop_after(tmp_path / "runs" / "stopped", 5, monkeypatch)
    assert run(config) == TEMPORARY_FAILURE
    assert [line["step"] for line in lines(tmp_path, "stopped")] == [1, 2, 3, 4, 5]
    assert load_reward_model(str(tmp_path / "runs" / "stopped"), torch.device("cpu")).max_tokens == 32
    assert run(config) == 0
    assert lines(tmp_path, "stopped") == lines(tmp_path, "whole")
    assert_bit_equal(state(tmp_path, "stopped", 12), state(tmp_path, "whole", 12))


def stop_after(folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process the signal that a scheduler sends, once the run has reported a step."""
    from fmray.runtime.metrics import FileReporter

    tell, told = FileReporter.__call__, []

    def tell_and_stop(self: FileReporter, at: int, metrics: dict[str, float]) -> None:
        tell(self, at, metrics)
        if at == step and not told:
            told.append(at)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FileReporter, "__call__", tell_and_stop)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = write_opinion_config(tmp_path, "run", "pairs", train__steps=4)
    assert run(config) == 0
    before = (tmp_path / "runs/run/metrics.jsonl").read_text()
    assert run(config) == 0
    assert (tmp_path / "runs/run/metrics.jsonl").read_text() == before


# --------------------------------------------------------------------------------------------------------- trl's trainer


@pytest.mark.slow
def test_decoder_only_pairs_learn_through_trl_and_go_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    keys = {"train__steps": 30, "train__checkpoint_every": 10, "train__evaluate_every": 20}
    model = pretrained(tmp_path, "gpt2")
    assert run(write_opinion_config(tmp_path, "whole", "pairs", **keys, **model)) == 0
    assert (tmp_path / "runs/whole/trl/checkpoint-30").is_dir()
    reports, measured = lines(tmp_path, "whole"), lines(tmp_path, "whole", "eval/")
    assert [report["step"] for report in reports] == list(range(1, 31))
    assert {"train/loss", "train/accuracy", "train/gradient_norm", "train/learning_rate"} <= reports[0].keys()
    assert [report["step"] for report in measured] == [20, 30]
    assert measured[-1]["eval/test/accuracy"] == 1.0
    loaded = load_reward_model(str(tmp_path / "runs" / "whole"), torch.device("cpu"))
    assert loaded.model.config.fmray_gain > 0

    config = write_opinion_config(tmp_path, "stopped", "pairs", **keys, **model)
    stop_after(tmp_path / "runs" / "stopped", 13, monkeypatch)
    assert run(config) == TEMPORARY_FAILURE
    assert run(config) == 0
    assert lines(tmp_path, "stopped") == lines(tmp_path, "whole")
    assert_bit_equal(state(tmp_path, "stopped", 30), state(tmp_path, "whole", 30))


def test_trl_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2 = write_opinion_config(tmp_path, "gpt2", "pairs", train__steps=2, **pretrained(tmp_path, "gpt2"))
    assert "trainer=fmray" in one_line(capsys, gpt2, "engine.kind=deepspeed")
    assert "trainer=fmray" in one_line(capsys, gpt2, "optimizer.ema_decay=0.9")
    assert "trainer=fmray" in one_line(capsys, gpt2, f"run.storage=memory://{tmp_path.name}")
    assert run(gpt2, "trainer=fmray", f"run.storage=memory://{tmp_path.name}") == 0
    bert = write_opinion_config(tmp_path, "bert", "pairs", train__steps=2)
    assert "no decoder-only model" in one_line(capsys, bert, "trainer=trl")
    ranked = write_opinion_config(tmp_path, "ranked", "rankings", train__steps=2)
    assert "learns pairs only" in one_line(capsys, ranked, "trainer=trl")


# ------------------------------------------------------------------------------------------------------------------ Ray


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.deepspeed
def test_two_ray_workers_learn_what_one_process_learns(ray_session: None, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"train__steps": 10, "optimizer__eps": 1e-4}
    assert run(write_opinion_config(tmp_path, "local", "rankings", **keys)) == 0
    sharded = {
        "runtime__kind": "ray",
        "runtime__workers": 2,
        "engine": {"kind": "deepspeed", "zero_stage": 2},
    }
    assert run(write_opinion_config(tmp_path, "ray", "rankings", **keys, **sharded)) == 0
    here, there = (lines(tmp_path, name) for name in ("local", "ray"))
    for mine, theirs in zip(here, there, strict=True):
        assert theirs["train/loss"] == pytest.approx(mine["train/loss"], rel=1e-4)
        assert theirs["train/accuracy"] == mine["train/accuracy"]
    one, two = (evaluation(tmp_path, name)["metrics"] for name in ("local", "ray"))
    assert two == pytest.approx(one, abs=1e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_trl_on_two_ray_workers(ray_session: None, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    keys: dict[str, Any] = {"train__steps": 20, "runtime__kind": "ray", "runtime__workers": 2}
    assert run(write_opinion_config(tmp_path, "trl", "pairs", **keys, **pretrained(tmp_path, "gpt2"))) == 0
    assert evaluation(tmp_path, "trl")["metrics"]["eval/test/accuracy"] == 1.0
    assert len(lines(tmp_path, "trl")) == 20


# ------------------------------------------------------------------------------------------------- one line, no traceback


def one_line(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str) -> str:
    capsys.readouterr()
    assert run(config, *overrides) == 1
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    return error


def test_bad_inputs_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_opinion_config(tmp_path, "bad", "pairs", train__steps=2)
    assert "all_pairs or plackett_luce" in one_line(capsys, config, "objective.kind=classification")
    assert "no meaning for plackett_luce" in one_line(
        capsys, config, "objective.kind=plackett_luce", "objective.margin=1"
    )
    assert "must divide among" in one_line(
        capsys, config, "runtime.kind=ray", "runtime.workers=4", "data.batch_size=6"
    )
    assert "reviews are labelled" in one_line(capsys, config, "data.source.kind=reviews")
    assert "no such folder" in one_line(capsys, config, f"data.source.path={tmp_path}/nowhere")
    assert "holds no texts.jsonl" in one_line(capsys, config, f"normalize.texts={tmp_path}/texts.jsonl")
    assert "did you mean data.micro_batch_size" in one_line(capsys, config, "data.micro_batch=2")
    assert "no key 'winner'" in one_line(capsys, config, "data.source.columns.chosen=winner")
