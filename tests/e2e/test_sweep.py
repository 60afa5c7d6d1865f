"""Sweeps through their door, over real training: in one process and on Ray Tune, which must come to the same."""

from __future__ import annotations

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

from fmray.cli import door, sweep
from fmray.errors import TEMPORARY_FAILURE
from fmray.runtime.run_folder import RunFolder
from fmray.tuning.on_ray import run_on_tune
from fmray.tuning.table import write_table
from fmray.tuning.trials import Trials
from tests.descent import descents, state_of
from tests.e2e.test_pretrain_local import lines
from tests.pictures import write_config
from tests.processes import assert_bit_equal, state

ROOT = Path(__file__).parent.parent.parent
RATES = "space.optimizer.lr={kind: grid, values: [1e-2, 1e-6]}"


def words(folder: Path, name: str, *others: str, **changes: Any) -> list[str]:
    """`fmray sweep …` over the shapes."""
    base = write_config(folder, "base", train__steps=3, train__evaluate_every=1, **changes)
    given = ["root=pretrain", f"file={base}", f"run.storage={folder}/runs", f"run.name={name}"]
    return [*given, "metric=eval/image_to_text/r5", RATES, "report.progress=false", *others]


def table(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / "runs" / name / "sweep.json").read_text()))


def test_a_sweep_trains_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three trials: one good, one beyond a constraint, one that cannot be built."""
    space = "space.model.embed_dim={kind: choice, values: [16]}"
    three = words(
        tmp_path,
        "small",
        space,
        "space.optimizer.lr={kind: grid, values: [1e-3, 1e-6]}",
        "constraints=[{metric: train/learning_rate, max: 1e-4}]",
        "pareto.x.metric=eval/image_to_text/r5",
        "pareto.y.metric=eval/text_to_image/r5",
        "pareto.color=train/loss",
        "base.optimizer.schedule=constant",
    )
    assert door(sweep, three) == 0
    found = table(tmp_path, "small")
    assert [row["feasible"] for row in found["trials"]] == [False, True]
    assert found["best"] == "trial-00001"
    assert "best: trial-00001 with optimizer.lr=1e-06, model.embed_dim=16" in capsys.readouterr().out
    assert "Trade-off" in (tmp_path / "runs/small/sweep.html").read_text()
    first = (tmp_path / "runs/small/trial-00001/metrics.jsonl").read_text()
    assert door(sweep, three) == 0
    assert (tmp_path / "runs/small/trial-00001/metrics.jsonl").read_text() == first
    capsys.readouterr()
    assert door(sweep, [*three, "space.optimizer.lr.values=[1e-3, 1e-5]"]) == 1
    error = capsys.readouterr().err
    assert "space.optimizer.lr.values" in error
    assert "run.fresh=true to start over" in error


def test_a_sweep_of_failures_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = words(tmp_path, "broken", "base.data.max_bad_share=0")
    for picture in (tmp_path / "shapes/train").rglob("*.png"):
        picture.write_bytes(b"not a picture")
    assert door(sweep, broken) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: all 2 trials failed; the first: ")
    assert error.count("\n") == 1
    assert door(sweep, [*broken, "run.name=typo", "space.optimizer.lrr={kind: choice, values: [1]}"]) == 1
    assert "did you mean optimizer.lr?" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_saves_the_trial_and_ends_with_75(tmp_path: Path) -> None:
    arguments = words(tmp_path, "stopped", "base.train.steps=4000", "base.train.evaluate_every=null")
    command = [sys.executable, str(ROOT / "jobs/sweep.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    trial = RunFolder(f"{tmp_path}/runs/stopped/trial-00000")
    deadline = time.monotonic() + 90
    while not any(line["step"] >= 3 for line in trial.metrics()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == TEMPORARY_FAILURE, output
    assert [row["status"] for row in table(tmp_path, "stopped")["trials"]] == ["paused", "waiting"]
    last = trial.metrics()[-1]["step"]
    assert (Path(trial.url) / f"checkpoints/step-{last:08d}/manifest.json").exists()


# --------------------------------------------------------------------------------------------------------------- on Ray


def ready(trials: Trials) -> Trials:
    trials.check()
    trials.forgive()
    return trials


def run_there(trials: Trials) -> dict[str, Any]:
    run_on_tune(ready(trials), lambda: write_table(trials))
    write_table(trials)
    return dict(json.loads(trials.folder.read_text("sweep.json")))


def on_ray(folder: Path, rates: tuple[float, ...], **changes: Any) -> Trials:
    return descents(folder, rates, **{"runtime": {"kind": "ray", "max_concurrent": 1}} | changes)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_and_local_come_to_the_same(ray_session: None, tmp_path: Path) -> None:
    """Real training, two trials at once on Ray, one after the other here: same keys, same losses, same weights."""
    for name, more in (("here", []), ("there", ["runtime.kind=ray", "runtime.max_concurrent=2"])):
        assert door(sweep, words(tmp_path, name, *more)) == 0
    here, there = (table(tmp_path, name)["trials"] for name in ("here", "there"))
    assert [row["keys"] for row in there] == [row["keys"] for row in here]
    for trial in ("trial-00000", "trial-00001"):
        runs = [f"{name}/{trial}" for name in ("here", "there")]
        assert lines(tmp_path, runs[1]) == lines(tmp_path, runs[0])
        assert lines(tmp_path, runs[1], "eval/") == lines(tmp_path, runs[0], "eval/")
        assert_bit_equal(*(state(tmp_path, run, 3) for run in runs))
    assert table(tmp_path, "there")["best"] == table(tmp_path, "here")["best"]


@pytest.mark.ray
@pytest.mark.slow
def test_asha_stops_the_worse_and_a_failing_trial_is_told(ray_session: None, tmp_path: Path) -> None:
    space = {
        "optimizer.fails_at": {"kind": "grid", "values": [None, 3]},
        "optimizer.lr": {"kind": "grid", "values": [0.5, 0.001]},
    }
    rule = {"kind": "asha", "grace": 2, "reduction": 2}
    trials = on_ray(tmp_path, (), space=space, scheduler=rule)
    found = run_there(trials)
    # one after the other: the first is the first anywhere, the second is worse at the first rung
    assert [row["status"] for row in found["trials"]][:2] == ["finished", "stopped"]
    assert [row["step"] for row in found["trials"]][:2] == [8, 2]
    assert found["trials"][2]["status"] == "failed"
    assert found["trials"][2]["note"] == "the data ends at step 3"
    assert state_of(trials, 0) == (8, pytest.approx(0.5**8))
    assert found["best"] == "trial-00000"
    again = run_there(trials)  # the failed ones are tried again, judged by what the others have shown
    assert again["trials"] == found["trials"]


@pytest.mark.ray
@pytest.mark.slow
def test_pbt_goes_on_from_the_donor_with_the_mutated_key(ray_session: None, tmp_path: Path) -> None:
    rule = {"kind": "pbt", "interval": 2, "quantile": 0.5, "resample": 0.0, "factors": (0.5, 0.5)}
    space = {"optimizer.lr": {"kind": "uniform", "low": 0.001, "high": 0.5}}
    trials = on_ray(tmp_path, (), space=space, trials=2, scheduler=rule)
    trials.base["train"]["steps"] = 12
    rates = [trials.record(number).keys["optimizer.lr"] for number in trials.numbers]
    worse = rates.index(min(rates))
    better = 1 - worse
    found = run_there(trials)
    assert [row["status"] for row in found["trials"]] == ["finished", "finished"]
    change = trials.record(worse).changes[0]
    assert change.donor == trials.name(better)
    assert change.keys == {"optimizer.lr": pytest.approx(rates[better] / 2)}
    # its own way up to the exploit, then from the donor's checkpoint at the mutated rate
    x_at = {line["step"]: line["train/x"] for line in trials.home(worse).metrics() if "train/x" in line}
    turn = min(step for step, x in x_at.items() if x != pytest.approx((1 - rates[worse]) ** step))
    assert turn > change.step >= 2
    assert x_at[turn] == pytest.approx((1 - rates[better]) ** (turn - 1) * (1 - rates[better] / 2))
    written = json.loads((tmp_path / f"sweep/trial-{worse:05d}/config.json").read_text())
    assert written["optimizer"]["lr"] == trials.record(worse).keys["optimizer.lr"]


@pytest.mark.ray
@pytest.mark.slow
def test_pbt_changes_the_rate_of_real_training(ray_session: None, tmp_path: Path) -> None:
    rule = "scheduler={kind: pbt, interval: 1, quantile: 0.5, resample: 1.0}"
    drawn = "space.optimizer.lr={kind: loguniform, low: 1e-4, high: 1e-2}"
    more = ["runtime.kind=ray", "runtime.max_concurrent=1", "trials=2", rule, "metric=train/loss"]
    arguments = [word for word in words(tmp_path, "bred") if not word.startswith(("space.", "metric="))]
    assert door(sweep, [*arguments, drawn, *more, "mode=min"]) == 0
    found = table(tmp_path, "bred")["trials"]
    changed = [row for row in found if row["changes"]]
    assert changed
    for row in changed:
        config = json.loads((tmp_path / "runs/bred" / row["name"] / "config.json").read_text())
        assert (
            config["optimizer"]["lr"]
            == row["keys"]["optimizer.lr"]
            == row["changes"][-1]["keys"]["optimizer.lr"]
        )
    assert [row["step"] for row in found] == [3, 3]


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_whose_process_dies_goes_on_and_one_that_dies_too_often_is_told(
    ray_session: None, tmp_path: Path
) -> None:
    space = {"optimizer.kills_at": {"kind": "grid", "values": [5]}}
    trials = on_ray(tmp_path, (), space=space)
    assert run_there(trials)["trials"][0]["status"] == "finished"
    assert state_of(trials, 0) == (8, pytest.approx(0.9**8))
    assert (tmp_path / "sweep/trial-00000/killed").exists()
    once = {"kind": "ray", "max_concurrent": 1, "max_failures": 0}
    fragile = on_ray(tmp_path / "fragile", (), space=space, runtime=once)
    row = run_there(fragile)["trials"][0]
    assert row["status"] == "failed"
    assert "its process died" in row["note"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_signal_ends_the_running_trials_and_starts_no_others(ray_session: None, tmp_path: Path) -> None:
    trials = on_ray(tmp_path, (0.1, 0.5, 0.001))
    trials.base["optimizer"]["seconds"] = 0.3
    trials.base["train"]["steps"] = 200

    def interrupt() -> None:
        while not any(line["step"] >= 2 for line in trials.home(0).metrics()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    found = run_there(trials)
    thread.join()
    assert [row["status"] for row in found["trials"]] == ["paused", "waiting", "waiting"]
    step, x = state_of(trials, 0)
    assert 2 <= step < 200
    assert x == pytest.approx(0.9**step)
