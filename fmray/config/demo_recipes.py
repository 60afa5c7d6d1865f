"""Recipes of the demo: on Ray, and in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fmray.config.answer_recipes import vqa_easy
from fmray.config.answers import AnswersConfig
from fmray.config.base import RunConfig, RuntimeConfig, Section
from fmray.config.demo import DemoConfig
from fmray.config.recipes import clip_emoji
from fmray.config.recipes import demo as clip_on_ray
from fmray.config.reward_recipes import reward_sentiment
from fmray.config.rlhf_recipes import ppo_demo, ppo_reviews
from fmray.config.sweep import (
    Constraint,
    GridDomain,
    Objective,
    ParetoConfig,
    SweepConfig,
    SweepRuntimeConfig,
)


def named(config: Any, name: str) -> Any:
    """A recipe's configuration under another run's name."""
    assert isinstance(config, Section)
    return config.replace(run=RunConfig(name=name))


def demo() -> DemoConfig:
    """On Ray: learners under DeepSpeed, actor pools, Ray Serve, Ray Tune; what `make demo` runs."""
    return DemoConfig(
        clip=named(clip_on_ray(), "clip"),
        vqa=short_vqa(RuntimeConfig(kind="ray", workers=1, threads=2)),
        reward=named(reward_sentiment(), "reward"),
        rlhf=named(ppo_demo(), "ppo"),
        sweep=short_runs(SweepRuntimeConfig(kind="ray", max_concurrent=2), threads=1),
    )


def demo_local() -> DemoConfig:
    """The same in one process, without Ray; what `make demo RUNTIME=local` runs."""
    return demo().replace(
        clip=named(clip_emoji(), "clip"),
        vqa=short_vqa(RuntimeConfig()),
        rlhf=named(ppo_reviews(), "ppo"),
        sweep=short_runs(SweepRuntimeConfig(), threads=None),
    )


def short_vqa(runtime: RuntimeConfig) -> AnswersConfig:
    """vqa_easy, stopped as soon as it sees: two minutes of steps."""
    easy = vqa_easy()
    return easy.replace(
        run=RunConfig(name="vqa"),
        runtime=runtime,
        train=easy.train.replace(steps=1200, checkpoint_every=None),
        evaluate=easy.evaluate.replace(max_samples=2000),
    )


def short_runs(runtime: SweepRuntimeConfig, threads: int | None) -> SweepConfig:
    """Two weights of grammar by two KL coefficients, a few iterations each: what a step towards either costs the other."""
    return SweepConfig(
        run=RunConfig(name="sweep"),
        runtime=runtime,
        base={
            "runtime": {"kind": "local", "workers": 1, "threads": threads},
            "engine": {"kind": "torch"},
            "rollout": {"batch_size": 32, "request_size": 32},
            "ppo": {"mini_batch_size": 16, "kl": {"controller": "fixed"}},
            "train": {"iterations": 5, "evaluate_prompts": 32, "checkpoint_every": None},
        },
        space={
            "rewards.grammar.weight": GridDomain(values=(0.25, 1.0)),
            "ppo.kl.coefficient": GridDomain(values=(0.02, 0.2)),
        },
        metric="eval/sentiment/raw",
        constraints=(Constraint(metric="eval/kl", max=8.0),),
        pareto=ParetoConfig(
            x=Objective(metric="eval/sentiment/raw"), y=Objective(metric="eval/grammar/raw"), color="eval/kl"
        ),
    )


DEMO_RECIPES: dict[str, Callable[[], DemoConfig]] = {"demo": demo, "demo_local": demo_local}
