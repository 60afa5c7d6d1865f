"""Recipes of models that answer about pictures: functions that return a whole configuration."""

from __future__ import annotations

from collections.abc import Callable

from fmray.config.answers import (
    AnswerEvaluateConfig,
    AnswersConfig,
    LanguageModelConfig,
    MllmModelConfig,
    OutputConfig,
    ProjectorConfig,
    VqaModelConfig,
)
from fmray.config.base import RunConfig
from fmray.config.data import EmojiSource
from fmray.config.dialogues import CaptionSource, DialogueDataConfig, EasyVqaSource, RequestSource
from fmray.config.rlhf import LoraConfig
from fmray.config.schema import (
    EngineConfig,
    ImageConfig,
    OptimizerConfig,
    PartConfig,
    TowerConfig,
    TrainConfig,
)

STAGE_1_RUN = "runs/mllm_stage1"
"""Where `fmray pretrain --recipe mllm_stage1` leaves its model."""

CLIP_RUN = "runs/clip_emoji"
"""Where `fmray pretrain --recipe clip_emoji` leaves its model."""


def vqa_easy() -> AnswersConfig:
    """A ViT from scratch, a frozen DistilBERT, a small GPT-2: easy-vqa's shapes in minutes on 2 cores."""
    return AnswersConfig(
        run=RunConfig(name="vqa_easy"),
        data=DialogueDataConfig(source=EasyVqaSource(), batch_size=48, questions_per_picture=4),
        model=VqaModelConfig(
            vision=TowerConfig(
                source="arch:vit",
                pretrained=False,
                overrides={
                    **{"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
                    **{"intermediate_size": 256, "image_size": 64, "patch_size": 8},
                    "initializer_range": 0.08,  # 1/√width: with ViT's own 0.02 shapes are not told apart for long
                },
            ),
            text=TowerConfig(source="asset:grammar_tagger"),
            text_layer=-5,  # its top was tuned to tell grammar: a color's share of the states is 0.07 there, 0.4 here
            decoder=LanguageModelConfig(
                source="arch:gpt2",
                tokenizer="answers",
                pretrained=False,
                overrides={
                    "n_embd": 128,
                    "n_layer": 3,
                    "n_head": 4,
                    "n_positions": 32,
                    "initializer_range": 0.08,
                },
            ),
            freeze="text",
            standardize=True,
            image=ImageConfig(size=64, normalize="half"),
            dropout=0.0,
        ),
        optimizer=OptimizerConfig(lr=1.5e-3, weight_decay=0.01, warmup_steps=50, schedule="hold"),
        engine=EngineConfig(precision="bf16"),
        train=TrainConfig(steps=2600, log_every=20, checkpoint_every=500),
    )


def vqa_easy_mean() -> AnswersConfig:
    """vqa_easy with the textbook's fusion: one averaged vector, which leaves cross-attention nothing to choose from."""
    concat = vqa_easy()
    assert isinstance(concat.model, VqaModelConfig)
    return concat.replace(run=RunConfig(name="vqa_easy_mean"), model=concat.model.replace(fusion="mean"))


def mllm_stage1() -> AnswersConfig:
    """The emoji CLIP's picture tower and SmolLM2-135M, both locked; the projector between learns from emoji and their names."""
    return AnswersConfig(
        run=RunConfig(name="mllm_stage1"),
        data=DialogueDataConfig(
            source=CaptionSource(pairs=EmojiSource(aliases=False)), batch_size=32, questions_per_picture=1
        ),
        model=MllmModelConfig(
            vision=TowerConfig(source=CLIP_RUN),
            language=LanguageModelConfig(source="asset:smollm2_135m"),
            projector=ProjectorConfig(kind="pixel_shuffle"),
            template="plain",
            max_tokens=64,
            max_answer_tokens=16,
        ),
        parts={"vision": PartConfig(train="none"), "language": PartConfig(train="none")},
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.0, warmup_steps=10),
        engine=EngineConfig(precision="bf16"),
        train=TrainConfig(steps=260, log_every=10, checkpoint_every=130),
        evaluate=AnswerEvaluateConfig(choices=50, max_samples=200),
    )


def mllm_stage2() -> AnswersConfig:
    """Stage 1's model taught to answer easy-vqa's questions: projector and an adapter of the language model learn."""
    first = mllm_stage1()
    return first.replace(
        run=RunConfig(name="mllm_stage2"),
        data=DialogueDataConfig(source=EasyVqaSource(), batch_size=8),
        model=MllmModelConfig(
            checkpoint=STAGE_1_RUN,
            lora=LoraConfig(rank=16),
            max_tokens=128,
            max_answer_tokens=8,
            row_tokens=256,
        ),
        parts={"vision": PartConfig(train="none")},
        optimizer=OptimizerConfig(lr=5e-4, weight_decay=0.0, warmup_steps=20),
        train=TrainConfig(steps=300, log_every=10, checkpoint_every=150),
        evaluate=AnswerEvaluateConfig(max_samples=1000),
    )


def mllm_output() -> AnswersConfig:
    """Stage 1's model taught to answer with a picture where one is asked for: an adapter and the output side learn."""
    first = mllm_stage1()
    return first.replace(
        run=RunConfig(name="mllm_output"),
        # both requests about a picture: they share its tokens, and their words differ little
        data=DialogueDataConfig(source=RequestSource(words=4000), batch_size=32, questions_per_picture=2),
        model=MllmModelConfig(
            checkpoint=STAGE_1_RUN,
            lora=LoraConfig(rank=16),
            output=OutputConfig(clip=CLIP_RUN),
            max_tokens=128,
            max_answer_tokens=16,
            row_tokens=256,
        ),
        parts={"vision": PartConfig(train="none"), "output": PartConfig(lr=1e-3)},
        optimizer=OptimizerConfig(lr=5e-4, weight_decay=0.0, warmup_steps=20),
        train=TrainConfig(steps=510, log_every=10, checkpoint_every=170),
        evaluate=AnswerEvaluateConfig(),
    )


ANSWER_RECIPES: dict[str, Callable[[], AnswersConfig]] = {
    "vqa_easy": vqa_easy,
    "vqa_easy_mean": vqa_easy_mean,
    "mllm_stage1": mllm_stage1,
    "mllm_stage2": mllm_stage2,
    "mllm_output": mllm_output,
}
