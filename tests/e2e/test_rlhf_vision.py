"""Whole PPO runs of a policy that sees, in one process: told, killed and resumed, learning what only a picture can tell."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fmray.cli import door, rlhf
from fmray.config.rewards import AnswerReward
from fmray.config.rlhf_recipes import RLHF_RECIPES
from fmray.models.answering import load_answering
from fmray.runtime.run_folder import RunFolder
from tests.e2e.test_rlhf_local import lines, written
from tests.processes import assert_bit_equal, finish, start_job, state, wait_for_step
from tests.quizzes import COLORS, a_guesser, quiz_run, tiny_seer


def test_a_run_tells_what_it_saw_and_its_model_answers(tmp_path: Path) -> None:
    config = quiz_run(tmp_path, tiny_seer(tmp_path / "seer"), **{"critic.kind": "shared"})
    assert door(rlhf, ["--config", written(config, tmp_path)]) == 0
    reports = lines(tmp_path, "story")
    assert {"eval/answer/raw", "eval/kl"} <= reports[0].keys()
    assert "reward/answer/raw" in reports[1]
    assert all(math.isfinite(value) for line in reports for value in line.values())
    run = RunFolder(str(tmp_path / "runs" / "story"))
    rows = [json.loads(line) for line in run.read_text("held_out", "version-00000002.jsonl").splitlines()]
    entries = {e["image"]: e for e in json.loads((tmp_path / "quiz/test.json").read_text())}
    assert len(rows) == 4
    for row in rows:
        assert row.keys() == {"prompt", "response", "picture", "answers", "answer", "letters"}
        assert row["answers"] == [entries[row["picture"]]["conversations"][1]["value"]]
    table = json.loads(run.read_text("samples", "step-00000002.json"))
    assert table[0].keys() == {"prompt", "response", "picture", "answers", "score", "answer", "letters"}
    assert table[0]["answers"] in COLORS
    answering = load_answering(str(tmp_path / "runs/story"), torch.device("cpu"))
    learned = state(tmp_path, "story", 2)
    for name, value in answering.model.projector.state_dict().items():
        assert torch.equal(value, learned[f"policy.projector.{name}|weight"])


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal_with_pixels_in_flight(tmp_path: Path) -> None:
    options = {"rollout.max_staleness": 1, "train.iterations": 12, "train.checkpoint_every": 3}
    seer = tiny_seer(tmp_path / "seer")
    finish(start_job("rlhf", written(quiz_run(tmp_path, seer, **options, **{"run.name": "whole"}), tmp_path)))
    killed = written(quiz_run(tmp_path, seer, **options, **{"run.name": "killed"}), tmp_path)
    process = start_job("rlhf", killed)
    wait_for_step(tmp_path, "killed", 4, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert lines(tmp_path, "killed")[-1]["step"] < 12
    finish(start_job("rlhf", killed))
    assert lines(tmp_path, "killed") == lines(tmp_path, "whole")
    assert_bit_equal(state(tmp_path, "killed", 12), state(tmp_path, "whole", 12))


@pytest.mark.slow
def test_a_reward_on_right_answers_teaches_to_look(tmp_path: Path) -> None:
    """A policy that names one of three colours by chance names the right one, on pictures that it never saw.

    A third is what anybody can expect who does not look: each colour is right equally often.
    """
    options: dict[str, Any] = {
        "rewards": {"answer": {"kind": "answer"}},
        "rollout": {"batch_size": 96, "request_size": 48, "max_new_tokens": 4},
        "ppo.mini_batch_size": 48,
        "critic.kind": "shared",
        "optimizer.lr": 2e-3,
        "train": {"iterations": 45, "evaluate_prompts": 24, "samples_every": 45},
    }
    config = quiz_run(tmp_path, a_guesser(tmp_path / "seer", list(COLORS)), **options)
    assert door(rlhf, ["--config", written(config, tmp_path)]) == 0
    reports = lines(tmp_path, "story")
    held_out = [line["eval/answer/raw"] for line in reports if "eval/answer/raw" in line]
    trained = [line["reward/answer/raw"] for line in reports if "reward/answer/raw" in line]
    assert trained[0] < 0.45
    assert held_out[0] < 0.6
    assert sum(trained[-5:]) / 5 > 0.8
    assert held_out[-1] > 0.75


def test_the_recipe_is_whole() -> None:
    config = RLHF_RECIPES["ppo_easy_vqa"]()
    assert isinstance(config.rewards["answer"], AnswerReward)
    assert config.prompts.source.kind == "questions"
    assert config.policy.lora is not None
    assert config.reference.kind == "adapter_off"
    assert config.train.evaluate_prompts == 128
