"""Whole PPO runs in one process: learning, killing, resuming, stopping, refusing. Real files, real processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fmray.cli import door, rlhf
from fmray.config.loading import dump_json
from fmray.config.rlhf import RlhfConfig
from fmray.errors import TEMPORARY_FAILURE
from fmray.runtime.run_folder import RunFolder
from tests.processes import assert_bit_equal, finish, start_job, state, wait_for_step
from tests.stories import story_run, tiny_gpt2, tiny_t5

CLOCKS = ("time", "samples_per_second", "tokens_per_second")


def written(config: RlhfConfig, folder: Path) -> str:
    """The configuration as a file for the command line."""
    path = folder / f"{config.run.name}.json"
    path.write_text(dump_json(config), encoding="utf-8")
    return str(path)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Reports without clocks."""
    reports = RunFolder(f"{folder}/runs/{name}").metrics()
    return [{k: v for k, v in r.items() if not any(clock in k for clock in CLOCKS)} for r in reports]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_6_24_a_toy_task_is_learned_with_a_bounded_kl(family: str, tmp_path: Path) -> None:
    """The share of the letters e, a and i rises by more than two of its deviations; the KL stays near its target."""
    policy = (tiny_t5 if family == "t5" else tiny_gpt2)(tmp_path / family)
    options: dict[str, Any] = {
        "rewards.repetition.weight": 0.0,
        "rollout.batch_size": 64,
        "rollout.request_size": 32,
        "ppo.mini_batch_size": 32,
        "ppo.epochs": 4,
        "ppo.kl": {"coefficient": 0.2, "controller": "adaptive", "target": 3.0, "horizon": 300},
        "optimizer.lr": 1e-3,
        "train.iterations": 30,
        "train.samples_every": 30,
    }
    config = story_run(tmp_path, policy, **options)
    assert door(rlhf, ["--config", written(config, tmp_path)]) == 0
    reports = [r for r in lines(tmp_path, "story") if "ppo/kl" in r]
    first, last = reports[0], reports[-1]
    gain = last["reward/letters/raw"] - first["reward/letters/raw"]
    assert gain > 2 * first["reward/letters/raw_std"]
    assert last["ppo/kl"] < 8
    assert abs(first["ppo/kl"]) < 1e-3


EVERYTHING: dict[str, Any] = {
    "rollout.max_staleness": 1,
    "ppo.kl": {"coefficient": 0.1, "controller": "adaptive", "target": 0.1, "horizon": 50},
    "train.iterations": 40,
    "train.checkpoint_every": 5,
    "train.evaluate_every": 10,
    "train.keep_checkpoints": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_6_21_and_6_13_killed_and_resumed_is_bit_equal(family: str, tmp_path: Path) -> None:
    """Samples in flight, an adaptive KL coefficient, running reward normalisers, two rewards, a critic: all of it goes on."""
    policy = (tiny_t5 if family == "t5" else tiny_gpt2)(tmp_path / family)
    whole = story_run(tmp_path, policy, **EVERYTHING, **{"run.name": "whole"})
    finish(
        start_job("rlhf", written(whole, tmp_path))
    )  # a process of its own too: another's memory may choose other kernels
    killed = written(story_run(tmp_path, policy, **EVERYTHING, **{"run.name": "killed"}), tmp_path)
    process = start_job("rlhf", killed)
    wait_for_step(tmp_path, "killed", 12, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert lines(tmp_path, "killed")[-1]["step"] < 40
    finish(start_job("rlhf", killed))
    assert lines(tmp_path, "killed") == lines(tmp_path, "whole")
    assert_bit_equal(state(tmp_path, "killed", 40), state(tmp_path, "whole", 40))
    coefficients = [line["ppo/kl_coefficient"] for line in lines(tmp_path, "whole") if "ppo/kl" in line]
    assert len(set(coefficients)) > 30  # it did adapt, so it could have been forgotten


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_75_and_the_run_goes_on(tmp_path: Path) -> None:
    policy = tiny_t5(tmp_path / "t5")
    options = {"train.iterations": 20}
    config = written(story_run(tmp_path, policy, **options), tmp_path)
    process = start_job("rlhf", config)
    wait_for_step(tmp_path, "story", 2, process)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == TEMPORARY_FAILURE, output
    assert "Traceback" not in output
    assert door(rlhf, ["--config", config]) == 0
    whole = story_run(tmp_path, policy, **options, **{"run.name": "whole"})
    assert door(rlhf, ["--config", written(whole, tmp_path)]) == 0
    assert lines(tmp_path, "story") == lines(tmp_path, "whole")


def test_staleness_is_what_was_allowed_and_is_corrected(tmp_path: Path) -> None:
    policy = tiny_t5(tmp_path / "t5")
    options: dict[str, Any] = {"rollout.max_staleness": 2, "train.iterations": 5}
    assert door(rlhf, ["--config", written(story_run(tmp_path, policy, **options), tmp_path)]) == 0
    reports = [line for line in lines(tmp_path, "story") if "ppo/kl" in line]
    assert [line["ppo/staleness"] for line in reports] == [0, 1, 2, 2, 2]
    assert reports[0]["ppo/importance"] == pytest.approx(1, abs=1e-5)
    assert all(abs(line["ppo/importance"] - 1) > 1e-4 for line in reports[2:])
    assert all(line["ppo/logp_difference"] > 1e-4 for line in reports[1:])


NAMES = {
    *("ppo/kl", "ppo/entropy", "ppo/score", "ppo/rlhf_reward", "ppo/clip_fraction", "ppo/approx_kl"),
    *("ppo/ratio_mean", "ppo/ratio_var", "ppo/explained_variance", "ppo/eos_rate", "ppo/length"),
    *("ppo/staleness", "time/act", "time/judge", "time/credit", "time/learn", "time/refresh"),
    *(
        "train/tokens_per_second",
        "train/samples_per_second",
        "reward/letters/raw",
        "reward/letters/normalized",
    ),
}


def test_6_19_a_run_tells_what_happened_and_its_model_opens_everywhere(tmp_path: Path) -> None:
    policy = tiny_t5(tmp_path / "t5")
    config = story_run(tmp_path, policy, **{"report.tensorboard": True})
    assert door(rlhf, ["--config", written(config, tmp_path)]) == 0
    run = RunFolder(str(tmp_path / "runs" / "story"))
    reports = run.metrics()
    assert reports[1].keys() >= NAMES
    assert {"eval/letters/raw", "eval/score", "eval/kl", "eval/distinct2"} <= reports[0].keys()
    assert reports[0]["eval/score"] == pytest.approx(0, abs=1e-5)
    rows = json.loads(run.read_text("samples", "step-00000002.json"))
    assert len(rows) == 4
    assert {"prompt", "response", "score", "letters", "repetition"} == rows[0].keys()
    assert len(run.read_text("held_out", "version-00000002.jsonl").splitlines()) == 4
    folder = tmp_path / "runs/story/checkpoints/step-00000002/model"
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generate(**tokenizer("the dog likes", return_tensors="pt"), max_new_tokens=4).shape[0] == 1
    trained = load_file(folder / "model.safetensors")
    learned = state(tmp_path, "story", 2)
    assert torch.equal(trained["lm_head.weight"], learned["policy.lm_head.weight|weight"])
    assert list((tmp_path / "runs/story/tensorboard").iterdir())


def test_an_adapter_is_saved_for_peft_and_merged_for_the_rest(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    policy = tiny_t5(tmp_path / "t5")
    lora: dict[str, Any] = {"policy.lora": {"rank": 4}, "optimizer.lr": 1e-2}
    assert door(rlhf, ["--config", written(story_run(tmp_path, policy, **lora), tmp_path)]) == 0
    folder = tmp_path / "runs/story/checkpoints/step-00000002/model"
    merged = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    base = AutoModelForSeq2SeqLM.from_pretrained(policy).eval()
    given = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 9, 10]])}
    plain = base(**given).logits
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    torch.testing.assert_close(adapted(**given).logits, merged(**given).logits, atol=1e-4, rtol=1e-4)
    assert (merged(**given).logits - plain).abs().max() > 1e-4


def test_a_reward_that_fails_stops_the_run_with_its_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"rewards.letters.function": "tests.stories:letters_or_failure"}
    config = written(story_run(tmp_path, tiny_t5(tmp_path / "t5"), **options), tmp_path)
    assert door(rlhf, ["--config", config]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "error: reward 'letters':" in error
    assert "rewards.letters.failure_budget=0 allows no more" in error
    assert "sample" in error


def test_a_run_of_something_else_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(story_run(tmp_path, tiny_t5(tmp_path / "t5")), tmp_path)
    assert door(rlhf, ["--config", config]) == 0
    capsys.readouterr()
    assert door(rlhf, ["--config", config, "ppo.epochs=3"]) == 1
    assert "ppo.epochs=3" in capsys.readouterr().err
    assert door(rlhf, ["--config", config, "train.iterations=3"]) == 0
    assert lines(tmp_path, "story")[-1]["step"] == 3
