"""Recipes: functions that return a whole configuration. A variant calls another and changes a few keys."""

from __future__ import annotations

from collections.abc import Callable

from fmray.config.schema import (
    AugmentConfig,
    DataConfig,
    EmojiSource,
    EngineConfig,
    EvaluateConfig,
    EvaluateRunConfig,
    ImageConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PartConfig,
    PretrainConfig,
    RunConfig,
    RuntimeConfig,
    TowerConfig,
    TrainConfig,
)
from fmray.config.serving import ServeConfig


def clip_emoji() -> PretrainConfig:
    """MobileNetV2 + MiniLM on emoji pictures and their English names: the demo's model, minutes on 2 cores."""
    return PretrainConfig(
        run=RunConfig(name="clip_emoji"),
        data=DataConfig(
            source=EmojiSource(languages=("en",), aliases=False),
            batch_size=128,
            augment=AugmentConfig(flip=0.5, rotate=10, translate=0.06, scale=0.15, color=0.2),
        ),
        model=ModelConfig(
            image=ImageConfig(
                size=192
            ),  # the drawings have 72 pixels, but the tower knows objects of this size
            vision_projection="affine",
            text_projection="identity",  # the sentence space of MiniLM is the shared space
            fold_batch_norm=True,
            warm_start="ridge",
        ),
        parts={
            "vision": PartConfig(
                train="last:11", lr=5e-4
            ),  # the early blocks are most of the time and learn little here
            "text": PartConfig(lr=1e-4),
        },
        objective=ObjectiveConfig(temperature=0.1),
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-8, warmup_steps=8),
        engine=EngineConfig(precision="bf16"),
        train=TrainConfig(steps=130, evaluate_every=26, checkpoint_every=65),
    )


def clip_emoji_korean() -> PretrainConfig:
    """clip_emoji that answers in Korean too: captions in both languages, a locked multilingual text tower."""
    english = clip_emoji()
    return english.replace(
        run=RunConfig(name="clip_emoji_korean"),
        data=english.data.replace(source=EmojiSource(languages=("ko", "en"), aliases=False)),
        model=english.model.replace(
            text=TowerConfig(source="asset:multilingual_sentences"),
            embed_dim=512,
            vision_projection="affine",
            text_projection="from_identity",
            warm_start="ridge",
        ),
        parts={**english.parts, "text": PartConfig(train="none"), "text_projection": PartConfig(lr=3e-4)},
        evaluate=english.evaluate.replace(languages=("ko", "en")),
    )


def demo() -> PretrainConfig:
    """clip_emoji under Ray Train: 2 workers, DeepSpeed ZeRO-2; the first part of `make demo`."""
    return clip_emoji().replace(
        run=RunConfig(name="demo"),
        runtime=RuntimeConfig(kind="ray", workers=2),
        engine=EngineConfig(kind="deepspeed", zero_stage=2, precision="bf16"),
    )


def clip_tiny() -> PretrainConfig:
    """Two tiny towers from scratch on the emoji pairs: seconds, for trying things and for tests."""
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return PretrainConfig(
        run=RunConfig(name="clip_tiny"),
        data=DataConfig(batch_size=32),
        model=ModelConfig(
            vision=TowerConfig(
                source="arch:vit", pretrained=False, overrides={**tiny, "image_size": 32, "patch_size": 8}
            ),
            text=TowerConfig(source="asset:minilm", pretrained=False, overrides=tiny),
            image=ImageConfig(size=32, normalize="half"),
            embed_dim=32,
        ),
        train=TrainConfig(steps=20),
        evaluate=EvaluateConfig(max_samples=64),
    )


PRETRAIN_RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "clip_emoji": clip_emoji,
    "clip_emoji_korean": clip_emoji_korean,
    "clip_tiny": clip_tiny,
    "demo": demo,
}
EVALUATE_RECIPES: dict[str, Callable[[], EvaluateRunConfig]] = {}
SERVE_RECIPES: dict[str, Callable[[], ServeConfig]] = {}
