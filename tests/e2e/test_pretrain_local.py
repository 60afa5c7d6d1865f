"""Whole runs in one process: learning, killing, resuming, stopping, refusing. Real files, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fmray.cli import door, evaluate, pretrain
from fmray.errors import TEMPORARY_FAILURE
from fmray.models.saved import load_dual_encoder
from fmray.runtime.run_folder import RunFolder
from tests.pictures import write_config
from tests.processes import ROOT, assert_bit_equal, start_job, state, wait_for_step


def lines(folder: Path, name: str, prefix: str = "train/") -> list[dict[str, Any]]:
    """Reports without clocks."""
    reports = RunFolder(f"{folder}/runs/{name}").metrics()
    clocks = ("time", "time/step", "time/data", "time/evaluate", "train/images_per_second")
    return [
        {k: v for k, v in r.items() if k not in clocks}
        for r in reports
        if any(k.startswith(prefix) for k in r)
    ]


def test_it_learns_saves_evaluates_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        tmp_path, "learn", train__steps=60, train__evaluate_every=30, optimizer__ema_decay=0.9
    )
    assert door(pretrain, ["--config", str(config)]) == 0
    reports, measured = lines(tmp_path, "learn"), lines(tmp_path, "learn", "eval/")
    assert [r["step"] for r in reports] == list(range(1, 61))
    assert reports[-1]["train/loss"] < 0.6 * reports[0]["train/loss"]
    assert [m["step"] for m in measured] == [30, 60]
    assert measured[-1]["eval/image_to_text/r5"] >= 0.75  # of 20 captions; chance is 0.25
    run = str(tmp_path / "runs" / "learn")
    source = [
        f"data.source.path={tmp_path}/shapes",
        "data.source.kind=folder",
        f"run.storage={tmp_path}/runs",
    ]
    assert (
        door(evaluate, [f"checkpoint={run}", *source, "evaluate.batch_size=8", "runtime.threads=1"]) == 0
    ), capsys.readouterr()
    again = json.loads((tmp_path / "runs" / "evaluate" / "evaluation.json").read_text())["metrics"]
    final = {name: value for name, value in measured[-1].items() if name.startswith("eval/")}
    assert {name: again[name] for name in final} == final  # the saved model is the measured one
    capsys.readouterr()


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(tmp_path: Path) -> None:
    """Dropout, augmentation, EMA, GradCache: everything that could remember something."""
    noisy: dict[str, Any] = {
        "train__steps": 30,
        "train__checkpoint_every": 5,
        "optimizer__ema_decay": 0.9,
        "model__tower_dropout": 0.1,
        "data__augment": {"flip": 0.5, "rotate": 10, "color": 0.2},
        "objective__grad_cache_chunk": 5,
    }
    assert door(pretrain, ["--config", str(write_config(tmp_path, "whole", **noisy))]) == 0
    config = write_config(tmp_path, "killed", **noisy)
    process = start_job("pretrain", config)
    wait_for_step(tmp_path, "killed", 12, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert door(pretrain, ["--config", str(config)]) == 0
    assert lines(tmp_path, "killed") == lines(tmp_path, "whole")
    assert lines(tmp_path, "killed", "eval/") == lines(tmp_path, "whole", "eval/")
    assert_bit_equal(state(tmp_path, "killed", 30), state(tmp_path, "whole", 30))


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_75_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    assert door(pretrain, ["--config", str(write_config(tmp_path, "whole", train__steps=60))]) == 0
    config = write_config(tmp_path, "stopped", train__steps=60)
    process = start_job("pretrain", config)
    wait_for_step(tmp_path, "stopped", 3, process)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == TEMPORARY_FAILURE, output
    assert "Traceback" not in output
    stopped_at = lines(tmp_path, "stopped")[-1]["step"]
    assert 3 <= stopped_at < 60
    assert door(pretrain, ["--config", str(config)]) == 0
    assert lines(tmp_path, "stopped") == lines(tmp_path, "whole")
    assert_bit_equal(state(tmp_path, "stopped", 60), state(tmp_path, "whole", 60))


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "altered":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("file", ["state/tensors-00000.safetensors", "model/model.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, how: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = str(write_config(tmp_path, "run", train__steps=6, train__checkpoint_every=3))
    assert door(pretrain, ["--config", config]) == 0
    whole, reports = state(tmp_path, "run", 6), lines(tmp_path, "run")
    damage(tmp_path / "runs/run/checkpoints/step-00000006" / file, how)
    assert door(pretrain, ["--config", config]) == 0
    assert f"step-00000006/{file}" in caplog.text
    assert {"truncated": "truncated", "altered": "altered", "missing": "missing"}[how] in caplog.text
    assert_bit_equal(state(tmp_path, "run", 6), whole)
    assert lines(tmp_path, "run") == reports


def test_old_checkpoints_go_and_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = str(
        write_config(tmp_path, "run", train__steps=8, train__checkpoint_every=2, train__keep_checkpoints=2)
    )
    assert door(pretrain, ["--config", config]) == 0
    checkpoints = tmp_path / "runs/run/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000006", "step-00000008"]
    before = (tmp_path / "runs/run/metrics.jsonl").read_text()
    assert door(pretrain, ["--config", config]) == 0
    assert (tmp_path / "runs/run/metrics.jsonl").read_text() == before
    assert door(pretrain, ["--config", config, "run.fresh=true", "train.steps=2"]) == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002"]


def test_a_run_of_something_else_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path, "run", train__steps=2))
    assert door(pretrain, ["--config", config]) == 0
    capsys.readouterr()
    assert door(pretrain, ["--config", config, "data.batch_size=10"]) == 1
    error = capsys.readouterr().err
    assert "data.batch_size=10" in error
    assert "was made with 12" in error
    assert error.count("\n") == 1


def test_a_full_disk_names_itself_and_the_last_good_checkpoint_survives(tmp_path: Path) -> None:
    """A real full disk: a tmpfs of 1 MiB where this may be mounted, else a size limit on the process's files."""
    config = write_config(tmp_path, "full", train__steps=12, train__checkpoint_every=4)
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(config), str(tmp_path / "runs/full/checkpoints")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    message = process.stderr.strip().splitlines()[-1]
    assert message.startswith("error: checkpoint of step 8 could not be saved:")
    assert "step-00000004" in message
    names = [path.name for path in (tmp_path / "runs/full/checkpoints").iterdir()]
    assert names == ["step-00000004"]
    assert door(pretrain, ["--config", str(config)]) == 0
    assert (tmp_path / "runs/full/checkpoints/step-00000012/manifest.json").exists()


FULL_DISK = """
import resource, signal, sys, threading, time
from pathlib import Path
from fmray.cli import door, pretrain

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails with an error, as on a full disk

def fill() -> None:
    while not Path(sys.argv[2], "step-00000004", "manifest.json").exists():
        time.sleep(0.001)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

threading.Thread(target=fill, daemon=True).start()
sys.exit(door(pretrain, ["--config", sys.argv[1]]))
"""


def test_a_run_on_an_fsspec_url_saves_resumes_and_loads(tmp_path: Path) -> None:
    storage = f"memory://{tmp_path.name}"
    config = str(
        write_config(tmp_path, "far", train__steps=6, train__checkpoint_every=3, train__keep_checkpoints=1)
    )
    assert door(pretrain, ["--config", config, f"run.storage={storage}", "train.steps=3"]) == 0
    assert door(pretrain, ["--config", config, f"run.storage={storage}"]) == 0
    far = RunFolder(f"{storage}/far")
    assert [line["step"] for line in far.metrics() if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    names = [
        str(path).rpartition("/")[2] for path in far.filesystem.ls(far.path("checkpoints"), detail=False)
    ]
    assert names == ["step-00000006"]
    assert load_dual_encoder(far.url, torch.device("cpu")).model.config.embed_dim == 16


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    for name, on in (("kept", False), ("recomputed", True)):
        config = write_config(tmp_path, name, train__steps=5, engine__activation_checkpointing=on)
        assert door(pretrain, ["--config", str(config)]) == 0
    assert lines(tmp_path, "recomputed") == lines(tmp_path, "kept")


# ------------------------------------------------------------------------------------------------- one line, no traceback


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert door(pretrain, list(arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def test_bad_inputs_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path, "bad", train__steps=2))
    assert "did you mean clip_tiny" in one_line(capsys, "--recipe", "clip_tinny")
    assert "did you mean train.steps" in one_line(capsys, "--config", config, "train.stepps=3")
    assert "no such file" in one_line(capsys, "--config", str(tmp_path / "none.yaml"))
    nowhere = one_line(capsys, "--config", config, f"data.source.path={tmp_path}/nowhere")
    assert "nowhere" in nowhere
    (tmp_path / "empty").mkdir()
    assert "empty" in one_line(capsys, "--config", config, f"data.source.path={tmp_path}/empty")
    jsonl = tmp_path / "jsonl"
    jsonl.mkdir()
    (jsonl / "train.jsonl").write_text('{"image": "gone.png", "caption": "a dog"}\n')
    (jsonl / "test.jsonl").write_text('{"image": "gone.png", "caption": "a dog"}\n')
    missing = one_line(capsys, "--config", config, "data.source.kind=jsonl", f"data.source.path={jsonl}")
    assert "gone.png" in missing
    assert "CUDA" in one_line(capsys, "--config", config, "runtime.device=cuda").replace("GPU", "CUDA")
    other = one_line(capsys, "--config", config, f"model.checkpoint={tmp_path}/text", "run.name=other")
    assert "dual encoder" in other or "holds no model" in other or "not CLIP" in other


def test_too_many_unreadable_pictures_stop_the_run_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, "broken", train__steps=10))
    broken = tmp_path / "shapes/train/red_circle/0.png"
    broken.write_bytes(b"not a picture")
    assert "red_circle/0.png" in one_line(capsys, "--config", config)
    assert door(pretrain, ["--config", config, "data.max_bad_share=0.05", "run.name=tolerant"]) == 0
    assert max(line["data/unreadable"] for line in lines(tmp_path, "tolerant", "data/")) == 1
    capsys.readouterr()
