"""Sweeps over PPO: reward weights and the KL coefficient, on tiny real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fmray.cli import door, sweep
from fmray.runtime.run_folder import RunFolder
from tests.stories import story_run, tiny_t5


def words(folder: Path, name: str, *others: str) -> list[str]:
    """`fmray sweep …` over stories."""
    config = story_run(folder, tiny_t5(folder / "policy"))
    file = folder / "story.json"
    file.write_text(config.model_dump_json(), encoding="utf-8")
    return [
        f"file={file}",
        f"run.storage={folder}/runs",
        f"run.name={name}",
        "report.progress=false",
        *others,
    ]


def trials_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(json.loads((folder / "runs" / name / "sweep.json").read_text())["trials"])


def reports(folder: Path, name: str) -> list[dict[str, Any]]:
    return RunFolder(f"{folder}/runs/{name}").metrics()


def test_reward_weights_and_kl_coefficient_under_a_kl_constraint(tmp_path: Path) -> None:
    arguments = words(
        tmp_path,
        "weights",
        "space.rewards.letters.weight={kind: uniform, low: 0.2, high: 1.0}",
        "space.ppo.kl.coefficient={kind: loguniform, low: 0.01, high: 0.3}",
        "trials=2",
        "metric=eval/score",
        "constraints=[{metric: eval/kl, max: 8}]",
        "pareto={x: {metric: eval/letters/raw}, y: {metric: eval/repetition/raw}, color: eval/kl}",
    )
    assert door(sweep, arguments) == 0
    for row in trials_of(tmp_path, "weights"):
        assert row["status"] == "finished", row["note"]
        assert row["metrics"]["ppo/kl_coefficient"] == pytest.approx(row["keys"]["ppo.kl.coefficient"])
        written = json.loads((tmp_path / "runs/weights" / row["name"] / "config.json").read_text())
        assert written["rewards"]["letters"]["weight"] == row["keys"]["rewards.letters.weight"]
        assert written["rewards"]["letters"]["kind"] == "python"


def test_a_population_goes_on_with_a_mutated_coefficient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fixed coefficient is the configuration's; an adaptive one the checkpoint's, and then cannot be swept this way."""
    arguments = words(
        tmp_path,
        "bred",
        "base.train.iterations=4",
        "space.ppo.kl.coefficient={kind: uniform, low: 0.01, high: 0.3}",
        "scheduler={kind: pbt, interval: 2, quantile: 0.5, resample: 0.0, factors: [0.5, 0.5]}",
        "trials=2",
        "metric=ppo/score",
    )
    assert door(sweep, [*arguments, "base.ppo.kl.controller=adaptive"]) == 1
    assert "'ppo.kl.coefficient': pbt changes keys in the middle of a run" in capsys.readouterr().err
    assert door(sweep, arguments) == 0
    (changed,) = [row for row in trials_of(tmp_path, "bred") if row["changes"]]
    (change,) = changed["changes"]
    after, donor = (
        {
            line["step"]: line["ppo/kl_coefficient"]
            for line in reports(tmp_path, f"bred/{name}")
            if "ppo/kl_coefficient" in line
        }
        for name in (changed["name"], change["donor"])
    )
    assert after[3] == after[4] == pytest.approx(change["keys"]["ppo.kl.coefficient"])
    assert after[3] == pytest.approx(donor[3] / 2)
