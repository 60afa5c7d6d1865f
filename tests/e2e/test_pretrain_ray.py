"""The same runs on Ray Train: equal to local ones, and alive after a worker is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fmray.cli import door, pretrain
from fmray.config.loading import validate
from fmray.config.schema import PretrainConfig
from fmray.errors import TEMPORARY_FAILURE
from fmray.runtime.context import Context, Outcome
from fmray.runtime.launch import launch
from fmray.runtime.metrics import FileReporter
from fmray.runtime.run_folder import RunFolder
from fmray.training.loop import pretrain as pretrain_room
from tests.e2e.test_pretrain_local import lines
from tests.pictures import shapes_run, write_config
from tests.processes import assert_bit_equal, state

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.deepspeed]

ENGINES = {"torch": {"kind": "torch"}} | {
    f"zero{n}": {"kind": "deepspeed", "zero_stage": n} for n in range(4)
}
TIGHT = 1e-4  # the bar: relative, fp32, dropout 0


def every_engine(config: PretrainConfig, context: Context) -> Outcome:
    """Work for `launch`: the run once per engine, each in a folder of its own, in one worker group."""
    for name, engine in ENGINES.items():
        folder = RunFolder(f"{context.folder.url}-{name}")
        reporters = [FileReporter(folder)] if context.rank == 0 else []
        here = dataclasses.replace(context, folder=folder, reporters=reporters)  # type: ignore[type-var]
        pretrain_room(config.replace(engine=engine), here)
    return Outcome(steps=config.train.steps, finished=True)


def losses(folder: Path, name: str) -> list[float]:
    return [line["train/loss"] for line in lines(folder, name)]


def configured(folder: Path, **changes: Any) -> PretrainConfig:
    return validate(PretrainConfig, shapes_run(folder, **changes))


def test_zero_0_to_3_one_and_two_workers_local_and_ray_are_one_curve(
    ray_session: None, tmp_path: Path
) -> None:
    averaged = {"optimizer__ema_decay": 0.9}
    launch(every_engine, configured(tmp_path, run__name="local", **averaged))
    for workers in (1, 2):
        there = {"run__name": f"ray{workers}", "runtime__kind": "ray", "runtime__workers": workers}
        launch(every_engine, configured(tmp_path, **there, **averaged))
    reference = losses(tmp_path, "local-torch")
    assert len(reference) == 20
    assert reference[-1] < 0.9 * reference[0]
    for place in ("local", "ray1", "ray2"):
        for engine in ENGINES:
            curve = losses(tmp_path, f"{place}-{engine}")
            worst = max(abs(a - b) / b for a, b in zip(curve, reference, strict=True))
            assert worst <= TIGHT, f"{place} {engine}: {worst:.1e}"
            tensors, expected = state(tmp_path, f"{place}-{engine}", 20), state(tmp_path, "local-torch", 20)
            assert tensors.keys() == expected.keys()
            far = {name: float((tensors[name] - expected[name]).abs().max()) for name in tensors}
            assert max(far.values()) <= 2e-4, f"{place} {engine}: {max(far, key=lambda name: far[name])}"
    for engine in ENGINES:  # equal threads, one rank: the same sums in the same order
        assert losses(tmp_path, f"ray1-{engine}") == losses(tmp_path, f"local-{engine}")


def test_a_run_goes_on_with_another_number_of_workers_and_another_engine(
    ray_session: None, tmp_path: Path
) -> None:
    launch(pretrain_room, configured(tmp_path, run__name="whole"))
    half = {"run__name": "moved", "train__steps": 20, "train__checkpoint_every": 10}
    two = configured(
        tmp_path,
        **half,
        runtime__kind="ray",
        runtime__workers=2,
        engine__kind="deepspeed",
        engine__zero_stage=3,
    )
    launch(pretrain_room, two)
    (tmp_path / "runs/moved/checkpoints/step-00000020/manifest.json").unlink()
    launch(
        pretrain_room, configured(tmp_path, **half)
    )  # steps 11 to 20 again, in one local process, plain torch
    assert losses(tmp_path, "moved") == pytest.approx(losses(tmp_path, "whole"), rel=TIGHT)


KEPT = (("memory", "json"), ("tensors", "safetensors"))
"""What each rank writes."""


def test_an_elastic_run_takes_what_there_is(ray_session: None, tmp_path: Path) -> None:
    """Of four CPUs, two workers that want two each are the most that fit; three are wanted, one would do."""
    wide = {"runtime__kind": "ray", "runtime__workers": (1, 3), "runtime__cpus_per_worker": 2.0}
    outcome = launch(pretrain_room, configured(tmp_path, run__name="elastic", train__steps=3, **wide))
    assert outcome == Outcome(steps=3, finished=True)
    files = sorted(
        path.name for path in (tmp_path / "runs/elastic/checkpoints/step-00000003/state").iterdir()
    )
    each = [f"{kind}-{rank:05d}.{ending}" for kind, ending in KEPT for rank in range(2)]
    assert files == [*each, "trainer.json"]


def worker_pid(folder: Path, name: str) -> int:
    return int((folder / "runs" / name / "pid").read_text())


def pretrain_and_tell_pid(config: PretrainConfig, context: Context) -> Outcome:
    if context.rank == 1:
        context.folder.write_text(str(os.getpid()), "pid")
    return pretrain_room(config, context)


def test_a_killed_worker_comes_back_and_the_result_is_bit_equal(ray_session: None, tmp_path: Path) -> None:
    shared = {"runtime__kind": "ray", "runtime__workers": 2, "train__steps": 60, "train__checkpoint_every": 5}
    noisy = {"model__tower_dropout": 0.1, "engine__kind": "deepspeed", "engine__zero_stage": 2}
    launch(pretrain_and_tell_pid, configured(tmp_path, run__name="whole", **shared, **noisy))

    def kill_in_the_middle() -> None:
        while not any(line["step"] >= 12 for line in lines(tmp_path, "killed")):
            time.sleep(0.01)
        os.kill(worker_pid(tmp_path, "killed"), signal.SIGKILL)

    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    launch(pretrain_and_tell_pid, configured(tmp_path, run__name="killed", **shared, **noisy))
    killer.join()
    assert lines(tmp_path, "killed") == lines(tmp_path, "whole")
    assert_bit_equal(state(tmp_path, "killed", 60), state(tmp_path, "whole", 60))


def test_mistakes_end_in_one_line_there_too(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, "bad", train__steps=4, runtime__kind="ray"))
    assert door(pretrain, ["--config", config, "runtime.workers=12", "run.name=many"]) == 1
    error = capsys.readouterr().err
    assert "need 12 CPU, but the cluster has 4" in error
    assert error.count("\n") == 1
    assert door(pretrain, ["--config", config, "runtime.gpus_per_worker=1", "run.name=gpu"]) == 1
    assert "need 1 GPU, but the cluster has 0" in capsys.readouterr().err
    (tmp_path / "shapes/train/red_circle/0.png").write_bytes(b"not a picture")
    assert (
        door(pretrain, ["--config", config, "runtime.workers=2", "runtime.max_failures=0", "train.steps=10"])
        == 1
    )
    error = capsys.readouterr().err
    assert "red_circle/0.png" in error
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error


def test_sigterm_to_the_driver_saves_and_ends_with_75(tmp_path: Path) -> None:
    """A driver with a Ray of its own, as a user starts it."""
    config = write_config(tmp_path, "stopped", train__steps=4000, runtime__kind="ray")
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not any(line["step"] >= 3 for line in lines(tmp_path, "stopped")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == TEMPORARY_FAILURE, output
    last = lines(tmp_path, "stopped")[-1]["step"]
    manifest = json.loads((tmp_path / f"runs/stopped/checkpoints/step-{last:08d}/manifest.json").read_text())
    assert manifest["step"] == last
