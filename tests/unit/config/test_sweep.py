"""A sweep's keys: what can be written on a command line, and what is refused with its cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fmray.config.loading import load_config
from fmray.config.sweep import ChoiceDomain, LogUniformDomain, PbtScheduler, SweepConfig, UniformDomain
from fmray.config.sweep_recipes import SWEEP_RECIPES
from fmray.errors import ConfigError


def loaded(*words: str) -> SweepConfig:
    return load_config(
        SweepConfig, SWEEP_RECIPES, ["--recipe", "sweep_clip_tiny", *words], door="fmray sweep"
    )


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(*words)
    return str(caught.value)


def test_a_space_is_written_dotted_nested_or_in_one_piece() -> None:
    config = loaded(
        "space.optimizer.lr.low=1e-6",  # a bound of the recipe's domain
        "space.objective.temperature={kind: uniform, low: 0.02, high: 1e-1}",
        "space.objective.kind.values=[infonce]",
        "space.optimizer.eps.kind=choice",
        "space.optimizer.eps.values=[1e-8, 1e-6]",
    )
    assert config.space == {
        "optimizer.lr": LogUniformDomain(low=1e-6, high=1e-2),
        "objective.kind": ChoiceDomain(values=("infonce",)),
        "objective.temperature": UniformDomain(low=0.02, high=0.1),
        "optimizer.eps": ChoiceDomain(values=(1e-8, 1e-6)),  # numbers, though YAML reads strings
    }


def test_another_kind_replaces_a_domain() -> None:
    config = loaded("space.optimizer.lr={kind: grid, values: [1e-3, 1e-2]}", "trials=null")
    assert config.trial_count == 2
    assert loaded("space.optimizer.lr={kind: grid, values: [1e-3, 1e-2]}").trial_count == 4


def test_another_scheduler_replaces_the_recipes(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("scheduler: {kind: asha, grace: 4}\n")
    config = loaded("--config", str(file), "scheduler.kind=pbt", "scheduler.interval=5")
    assert config.scheduler == PbtScheduler(interval=5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["space.optimizer.lr.low=1"], "space.optimizer.lr.low=1.0: must be below high=0.01"),
        (["space.optimizer.lr.kind=log"], "must be one of choice, grid, uniform, loguniform, randint"),
        (["trials=null"], "trials=None: say how many"),
        (["space.run.seed={kind: grid, values: [0, 1, 2]}"], "trials=4: must be a multiple of the grid's 3"),
        (["scheduler.kind=asha"], "scheduler.grace=None: is required"),
        (["scheduler={kind: pbt, interval: 2}", "trials=1"], "a population needs at least 2"),
        (["constraints=[{metric: eval/kl}]"], "give max, min or both"),
        (["report.prometheus_port=9000"], "trials would share the port"),
        (["metrik=eval/score"], "did you mean metric?"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], said: str) -> None:
    assert said in refusal(*words)


def test_the_recipes_are_whole_and_travel_as_json() -> None:
    for make in SWEEP_RECIPES.values():
        config: Any = make()
        assert SweepConfig.model_validate_json(config.model_dump_json()) == config
