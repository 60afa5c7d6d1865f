"""The demo road with few steps: every stage for real, both ways, the page looked at by a real browser where there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.opinions import opinion_run
from tests.stories import story_run, tiny_encoder, tiny_t5

ROOT = Path(__file__).parent.parent.parent

SHORT = [
    "parts=[clip,vqa]",
    "clip.train.steps=4",
    "clip.train.evaluate_every=2",
    "clip.train.checkpoint_every=null",
    "clip.data.batch_size=32",
    "clip.model.image.size=64",
]


def run_demo(folder: Path, *arguments: str) -> tuple[Path, str]:
    """The demo's folder, and what was printed."""
    command = [sys.executable, "-m", "fmray.cli", "demo", *arguments, f"run.storage={folder}"]
    environment = {**os.environ, "TQDM_MININTERVAL": "5"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=290, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "demo", done.stdout


def look_at(page: Path, picture: Path) -> None:
    """The page is more than white in a browser; skips where Debian's chromium is not installed."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the page was not looked at: Debian's chromium is not installed")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--window-size=1200,1600",
        f"--user-data-dir={picture.parent}/profile",
    ]
    command = [chromium, *flags, f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, capture_output=True, check=True, timeout=90)
    from PIL import Image

    with Image.open(picture) as opened:
        assert len(set(opened.convert("L").resize((120, 160)).getdata())) > 20


def needs_nothing_else(page: str) -> bool:
    return "http://" not in page.replace("http://www.w3.org/", "")


# ---------------------------------------------------------------------------------------------------------------- CLIP


def check_clip(run: Path, printed: str) -> None:
    assert "retrieval on unseen concepts" in printed
    assert "asked through the openai client" in printed
    summary = json.loads((run / "summary.json").read_text())
    clip = summary["clip"]
    assert clip["train"]["steps"] == 4
    assert 0 <= clip["results"]["eval/image_to_text/r1"] <= clip["results"]["eval/image_to_text/r5"] <= 1
    assert len(clip["endpoint"]) == 6
    assert all(len(turn["answers"]) == 5 and turn["milliseconds"] > 0 for turn in clip["endpoint"])
    assert {"assets of CLIP", "training", "evaluation", "endpoint"} <= set(summary["seconds"])
    assert summary["rlhf"] is None
    page = (run / "report.html").read_text()
    for words in (
        "Loss",
        "Recall, picture",
        "Zero-shot classification",
        "asked with the openai client",
        "Resolved configuration",
    ):
        assert words in page
    assert needs_nothing_else(page)


# ----------------------------------------------------------------------------------------------------------------- VQA

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SHORT_VQA = [
    "vqa.train.steps=4",
    "vqa.train.log_every=1",
    "vqa.data.batch_size=4",
    "vqa.data.max_train_groups=40",
    "vqa.evaluate.max_samples=48",
    "vqa.model.image.size=16",
    f"vqa.model.vision.overrides={json.dumps({**TINY, 'image_size': 16, 'patch_size': 8})}",
    f"vqa.model.decoder.overrides={json.dumps({'n_embd': 16, 'n_layer': 1, 'n_head': 2, 'n_positions': 32})}",
]
"""Tiny towers from scratch; the question's tower is the recipe's own, which is locked."""


def check_vqa(run: Path, printed: str) -> None:
    assert "VQA, 4 steps: loss" in printed
    assert "right answers, 48 test questions" in printed
    summary = json.loads((run / "summary.json").read_text())
    vqa = summary["vqa"]
    assert vqa["train"]["steps"] == 4
    assert vqa["questions"] == 48
    assert {row["kind"] for row in vqa["kinds"]} == {"color", "shape", "yes/no"}
    blind = {"eval/exact_match", "eval/question_only", "eval/majority"}
    assert all(0 <= vqa["results"][name] <= 1 for name in blind)
    assert 6 < len(vqa["endpoint"]) <= 18
    assert len({turn["picture"] for turn in vqa["endpoint"]}) == 6
    assert all(turn["right"] and turn["milliseconds"] > 0 for turn in vqa["endpoint"])
    assert {"assets of VQA", "VQA training", "VQA endpoint"} <= set(summary["seconds"])
    page = (run / "report.html").read_text()
    for words in (
        "VQA: questions about pictures",
        "Right answers by type of question",
        "question only",
        "Wrong answers",
        "The VQA endpoint, asked with the openai client",
    ):
        assert words in page, words
    assert needs_nothing_else(page)


@pytest.mark.slow
@pytest.mark.assets
def test_clip_and_vqa_in_one_process(tmp_path: Path) -> None:
    run, printed = run_demo(tmp_path, "--recipe", "demo_local", *SHORT, *SHORT_VQA)
    check_clip(run, printed)
    check_vqa(run, printed)
    look_at(run / "report.html", tmp_path / "page.png")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.assets
def test_clip_and_vqa_on_ray(tmp_path: Path) -> None:
    """CLIP with two workers under ZeRO-2, the VQA model with one; both served by Ray Serve."""
    run, printed = run_demo(tmp_path, *SHORT, *SHORT_VQA)
    check_clip(run, printed)
    check_vqa(run, printed)


# ---------------------------------------------------------------------------------------------------------------- RLHF


def tiny_demo(folder: Path, **changes: Any) -> str:
    """A whole second part of seconds, as a file: a tiny reward model, a tiny policy, two trials."""
    rlhf = story_run(folder, tiny_t5(folder / "t5"), **changes)
    rewards = {
        "sentiment": {
            "kind": "classifier",
            "source": "runs/reward_sentiment",
            "label": "good",
            "max_tokens": 32,
        },
        "grammar": {"kind": "python", "function": "tests.stories:letter_share"},
        "repetition": {"kind": "repetition", "weight": 0.5},
    }
    own_run = {"name": "ppo", "storage": "runs"}
    keys = {
        "parts": ["rlhf"],
        "reward": {**opinion_run(folder), "run": {"name": "reward"}},
        "rlhf": {**rlhf.model_dump(mode="json"), "run": own_run, "rewards": rewards},
        "second": {
            "encoder": str(tiny_encoder(folder / "encoder")),
            "probe_reviews": 60,
            "counted_reviews": 200,
            "grammar": {"kind": "python", "function": "tests.stories:letter_share"},
        },
        "sweep": {
            "base": {
                "runtime": {"threads": 1},
                "train": {"iterations": 1},
                "rollout": {"batch_size": 8, "request_size": 4},
                "ppo": {"mini_batch_size": 8},
            },
            "runtime": {"kind": "local"},
            "report": {"progress": True},
        },
    }
    path = folder / "demo.json"
    path.write_text(json.dumps(keys), encoding="utf-8")
    return str(path)


def check_rlhf(run: Path, printed: str) -> None:
    summary = json.loads((run / "summary.json").read_text())
    found = summary["rlhf"]
    assert found["iterations"] == 2
    measures = [row["what"] for row in found["verdict"]]
    assert sum("second judge" in what for what in measures) == 3
    assert all(any(name in what for what in measures) for name in ("weighted", "KL", "distinct-2", "length"))
    assert 0 <= found["reward_model"]["eval/test/accuracy"] <= 1
    shown = {"eval/sentiment/raw", "eval/grammar/raw", "eval/kl"}
    assert all(shown <= trial["metrics"].keys() for trial in found["sweep"]["trials"])
    assert [trial["status"] for trial in found["sweep"]["trials"]] == ["finished"] * 4
    assert {trial["keys"]["rewards.grammar.weight"] for trial in found["sweep"]["trials"]} == {0.25, 1.0}
    stages = {"assets of PPO", "reward model", "PPO", "second opinions", "sweep"}
    assert set(summary["seconds"]) == stages
    assert "reward model, held-out accuracy" in printed
    assert "held-out prompts" in printed
    page = (run / "report.html").read_text()
    for words in (
        "Verdict",
        "Answers before and after",
        "Reward: sentiment, raw",
        "KL coefficient",
        "Seconds of an iteration",
        "accuracy by confidence",
        "Sweep: trade-off",
    ):
        assert words in page, words
    assert needs_nothing_else(page)


@pytest.mark.slow
@pytest.mark.assets
def test_rlhf_in_one_process_and_again(tmp_path: Path) -> None:
    """A second start finds everything done, and says the same; a fresh one begins again."""
    options = ["--recipe", "demo_local", "--config", tiny_demo(tmp_path)]
    run, printed = run_demo(tmp_path / "runs", *options)
    check_rlhf(run, printed)
    lines = (run / "ppo" / "metrics.jsonl").read_text()
    verdict = json.loads((run / "summary.json").read_text())["rlhf"]["verdict"]
    run_demo(tmp_path / "runs", *options)
    assert (run / "ppo" / "metrics.jsonl").read_text() == lines
    assert json.loads((run / "summary.json").read_text())["rlhf"]["verdict"] == verdict
    run_demo(tmp_path / "runs", *options, "run.fresh=true", "rlhf.train.iterations=1")
    assert json.loads((run / "summary.json").read_text())["rlhf"]["iterations"] == 1
    look_at(run / "report.html", tmp_path / "page.png")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.assets
def test_rlhf_on_ray_pools_with_a_sweep_by_tune(tmp_path: Path) -> None:
    pool = {"cpus": 0.1, "threads": 1}
    changes: dict[str, Any] = {
        "runtime": {"kind": "ray", "workers": 1, "cpus_per_worker": 0.5, "threads": 1},
        "rollout.pool": pool,
        "reference.pool": pool,
    }
    config = tiny_demo(tmp_path, **changes)
    small = [f"rlhf.rewards.{name}.pool.cpus=0.1" for name in ("sentiment", "grammar")]
    tune = ["sweep.runtime.kind=ray", "sweep.runtime.max_concurrent=2"]
    check_rlhf(*run_demo(tmp_path / "runs", "--config", config, *small, *tune))
