"""The demo road with few steps: every stage for real, both ways, the page looked at by a real browser where there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

SHORT = [
    "train.steps=4",
    "train.evaluate_every=2",
    "train.checkpoint_every=null",
    "data.batch_size=32",
    "model.image.size=64",
]
LOCAL = ["runtime.kind=local", "runtime.workers=1", "engine.kind=torch"]


def run_demo(folder: Path, *overrides: str) -> Path:
    command = [sys.executable, "-m", "fmray.cli", "demo", f"run.storage={folder}", *SHORT, *overrides]
    environment = {**os.environ, "TQDM_MININTERVAL": "5"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "retrieval on unseen concepts" in done.stdout
    assert "asked through the openai client" in done.stdout
    return folder / "demo"


def check(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train"]["steps"] == 4
    assert (
        0 <= summary["results"]["eval/image_to_text/r1"] <= summary["results"]["eval/image_to_text/r5"] <= 1
    )
    assert len(summary["endpoint"]) == 6
    assert all(len(turn["answers"]) == 5 and turn["milliseconds"] > 0 for turn in summary["endpoint"])
    assert set(summary["seconds"]) == {"assets", "training", "evaluation", "endpoint"}
    page = (run / "report.html").read_text()
    for words in (
        "Loss",
        "Recall, picture",
        "Zero-shot classification",
        "asked with the openai client",
        "Resolved configuration",
    ):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org/", "")  # nothing is fetched


@pytest.mark.slow
@pytest.mark.assets
def test_demo_in_one_process(tmp_path: Path) -> None:
    run = run_demo(tmp_path, *LOCAL)
    check(run)
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the page was not looked at: Debian's chromium is not installed")
    picture = tmp_path / "page.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--window-size=1200,1600",
    ]
    command = [
        chromium,
        *flags,
        f"--user-data-dir={tmp_path}/profile",
        f"--screenshot={picture}",
        (run / "report.html").as_uri(),
    ]
    subprocess.run(command, capture_output=True, check=True, timeout=90)
    from PIL import Image

    with Image.open(picture) as opened:
        assert len(set(opened.convert("L").resize((120, 160)).getdata())) > 20  # more than a blank page


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.assets
def test_demo_on_ray_with_two_workers_and_zero(tmp_path: Path) -> None:
    check(run_demo(tmp_path))
