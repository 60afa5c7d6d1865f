"""Recipes of reward models."""

from __future__ import annotations

from collections.abc import Callable

from fmray.config.base import RunConfig
from fmray.config.reward import (
    ReviewVerdicts,
    RewardDataConfig,
    RewardEvaluateConfig,
    RewardModelConfig,
    RewardModelSection,
)
from fmray.config.schema import EngineConfig, OptimizerConfig, TrainConfig


def reward_sentiment() -> RewardModelConfig:
    """MiniLM that tells good reviews from bad ones, short pieces too: the demo's sentiment reward, two minutes on 2 cores."""
    return RewardModelConfig(
        run=RunConfig(name="reward_sentiment"),
        data=RewardDataConfig(source=ReviewVerdicts(imdb=2000, continuations=True), batch_size=32),
        model=RewardModelSection(source="asset:minilm", freeze_embeddings=True, max_tokens=64),
        optimizer=OptimizerConfig(lr=2e-4, weight_decay=0.01, schedule="linear", warmup_steps=30),
        engine=EngineConfig(precision="bf16"),
        train=TrainConfig(steps=400, log_every=10),
    )


def reward_tiny() -> RewardModelConfig:
    """A tiny encoder from scratch on the same reviews: seconds, for trying things and for tests."""
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return RewardModelConfig(
        run=RunConfig(name="reward_tiny"),
        model=RewardModelSection(
            source="arch:bert", tokenizer="asset:minilm", pretrained=False, overrides=tiny, max_tokens=32
        ),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.01, schedule="linear"),
        train=TrainConfig(steps=40),
        evaluate=RewardEvaluateConfig(max_samples=64),
    )


REWARD_MODEL_RECIPES: dict[str, Callable[[], RewardModelConfig]] = {
    "reward_sentiment": reward_sentiment,
    "reward_tiny": reward_tiny,
}
