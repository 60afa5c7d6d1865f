"""Where the demo's runs lie, what they hand each other, what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fmray.config.demo import DemoConfig
from fmray.config.demo_recipes import DEMO_RECIPES, demo
from fmray.config.loading import load_config, validate
from fmray.config.rlhf import RlhfConfig
from fmray.errors import ConfigError, ResourceError
from fmray.pipeline.demo_stages import Stages, placed, run_to_its_end, words_in
from fmray.pipeline.sweep import open_sweep
from fmray.rlhf.loop import train_ppo
from fmray.rlhf.roles import pool_plan
from fmray.runtime.context import Context, Outcome
from fmray.runtime.run_folder import RunFolder
from tests.stories import story_run, tiny_t5


def loaded(*words: str) -> DemoConfig:
    return load_config(DemoConfig, DEMO_RECIPES, ["--recipe", "demo_local", *words], door="fmray demo")


def test_all_runs_lie_in_the_demos_folder_and_share_its_seed(tmp_path: Path) -> None:
    runs = placed(loaded(f"run.storage={tmp_path}", "run.name=mine", "run.seed=3", "run.fresh=true"))
    parts: tuple[Any, ...] = (runs.clip, runs.vqa, runs.reward, runs.rlhf, runs.sweep)
    for part, name in zip(parts, ("clip", "vqa", "reward", "ppo", "sweep"), strict=True):
        assert part.run.name == name
        assert (part.run.storage, part.run.seed, part.run.fresh) == (f"{tmp_path}/mine", 3, False)
    assert runs.names(["clip"]) == ["clip"]
    assert runs.names(["rlhf", "vqa", "clip"]) == ["reward", "ppo", "sweep", "vqa", "clip"]


def test_a_stranger_gets_all_parts() -> None:
    assert demo().parts == ("clip", "vqa", "rlhf")
    assert (demo().vqa.runtime.kind, loaded().vqa.runtime.kind) == ("ray", "local")


def test_ppo_judges_with_the_model_that_was_trained_here(tmp_path: Path) -> None:
    runs = placed(loaded(f"run.storage={tmp_path}", "reward.train.steps=7"))
    source = runs.rlhf.rewards["sentiment"].source  # type: ignore[union-attr]
    assert source == f"{tmp_path}/demo/reward/checkpoints/step-00000007/model"
    assert runs.rlhf.rewards["grammar"].source == "asset:grammar_tagger"  # type: ignore[union-attr]
    other = placed(loaded("rlhf.rewards.sentiment.source=somebody/else"))
    assert other.rlhf.rewards["sentiment"].source == "somebody/else"  # type: ignore[union-attr]


@pytest.mark.parametrize("recipe", sorted(DEMO_RECIPES))
def test_trials_are_the_demos_ppo_run_but_for_the_sweeps_base(recipe: str, tmp_path: Path) -> None:
    words = [f"run.storage={tmp_path}", "rlhf.rollout.max_new_tokens=9", "sweep.base.train.iterations=3"]
    runs = placed(load_config(DemoConfig, DEMO_RECIPES, ["--recipe", recipe, *words], door="fmray demo"))
    trials = open_sweep(runs.sweep)
    config: RlhfConfig = trials.config(3)
    assert config.rollout.max_new_tokens == 9
    assert config.train.iterations == 3
    assert (config.rewards["grammar"].weight, config.ppo.kl.coefficient) == (1.0, 0.2)
    assert config.rewards["sentiment"] == runs.rlhf.rewards["sentiment"]
    assert config.runtime.kind == "local"
    assert config.run.name == "trial-00003"


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("clip.run.seed=4", "write run.seed="),
        ("rlhf.run.storage=elsewhere", "write run.storage="),
        ("vqa.run.seed=4", "write run.seed="),
        ("vqa.run.storage=elsewhere", "write run.storage="),
        ("vqa.run.fresh=true", "write run.fresh="),
        ("rlhf.run.name=clip", "must differ"),
        ("vqa.run.name=sweep", "must differ"),
        ("vqa.data.source.kind=captions", "asks questions"),
        ("vqa.evaluate.choices=4", "ranks captions"),
        ("rlhf.train.evaluate_prompts=0", "held-out prompts"),
        ("sweep.recipe=ppo_reviews", "its own PPO run"),
        ("run.storage=s3://bucket", "on this machine"),
        ("parts=[clip,mllm]", "must be one of clip, vqa, rlhf"),
    ],
)
def test_what_cannot_work_is_refused_with_its_cure(word: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loaded(word)


def test_second_judges_need_their_rewards() -> None:
    keys: dict[str, Any] = demo().model_dump()
    del keys["rlhf"]["rewards"]["grammar"]
    with pytest.raises(ConfigError, match="second judges stand beside"):
        validate(DemoConfig, keys)


def test_parts_may_be_written_as_words() -> None:
    assert loaded("parts=rlhf,clip").parts == ("rlhf", "clip")
    assert loaded("parts=vqa").parts == ("vqa",)
    assert loaded("parts=[rlhf]").parts == ("rlhf",)


def test_stages_are_timed_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stages()
    with stage("first"):
        pass
    assert list(stage.seconds) == ["first"]
    assert "first" in capsys.readouterr().err


def test_a_run_goes_on_until_it_is_done_and_is_not_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = story_run(tmp_path, tiny_t5(tmp_path / "t5"), **{"train.iterations": 3})
    home, starts = RunFolder.of(config.run), 0

    def work(config: RlhfConfig, context: Context) -> Outcome:
        nonlocal starts
        starts += 1
        if starts == 1:
            home.write_text("", "stop")  # somebody wants it to end
        return train_ppo(config, context)

    with pytest.raises(ResourceError, match="PPO stopped after 1 steps"):
        run_to_its_end("PPO", work, config, 3, pool_plan(config))
    run_to_its_end("PPO", work, config, 3, pool_plan(config))
    assert "done already" not in capsys.readouterr().err
    run_to_its_end("PPO", work, config, 3, pool_plan(config))
    assert "done already" in capsys.readouterr().err
    assert starts == 2
    assert home.metrics()[-1]["step"] == 3
    changed = config.replace(ppo=config.ppo.replace(epochs=1))
    with pytest.raises(ConfigError, match=r"ppo\.epochs"):
        run_to_its_end("PPO", work, changed, 3, pool_plan(changed))


def test_assets_are_found_wherever_they_stand() -> None:
    found = set(words_in(demo().rlhf.model_dump(mode="json")))
    assert {"asset:flan_t5_small", "asset:grammar_tagger", "reviews"} <= found
    assert list(words_in({"a": ["b", {"c": ("d", 1, None)}]})) == ["b", "d"]
