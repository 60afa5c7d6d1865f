"""Models that answer about pictures: the VQA model and the multimodal LLM, and a whole training of either."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from fmray.config.base import ReportConfig, RunConfig, RuntimeConfig, Section
from fmray.config.dialogues import DialogueDataConfig, RequestSource
from fmray.config.rlhf import LoraConfig
from fmray.config.schema import (
    EngineConfig,
    ImageConfig,
    OptimizerConfig,
    PartConfig,
    TowerConfig,
    TrainConfig,
)
from fmray.errors import ConfigError

Freezing = Literal["nothing", "image", "text", "encoders", "decoder", "all_but_projections"]

FREEZINGS: dict[str, dict[str, str]] = {
    "nothing": {},
    "image": {"vision": "none"},
    "text": {"text": "none"},
    "encoders": {"vision": "none", "text": "none"},
    "decoder": {"decoder": "cross_attention"},
    "all_but_projections": {"vision": "none", "text": "none", "decoder": "none"},
}
"""What each freezing of the VQA model says of its parts; the others learn."""


class LanguageModelConfig(Section):
    """The language model that speaks: a decoder, causal."""

    source: str
    """`asset:smollm2_135m`, a hub id, a local folder, or `arch:gpt2` with `pretrained=false`."""
    tokenizer: str | None = None
    """Where the tokenizer is; None: with the model (an `arch:` has none). `answers`: one is learned from the training answers."""
    pretrained: bool = True
    """Load the weights; False keeps the architecture alone."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of its transformers configuration to change (from-scratch models: `n_embd`, `hidden_size`, …)."""


class VqaModelConfig(Section):
    """Picture tower + question tower → fused tokens → a decoder with cross-attention that writes the answer."""

    kind: Literal["vqa"] = "vqa"
    checkpoint: str | None = None
    """Start from a saved VQA model (a model, checkpoint or run folder); then the towers below are not read."""
    vision: TowerConfig = TowerConfig(source="google/vit-base-patch16-224")
    """The picture's tower."""
    text: TowerConfig = TowerConfig(source="distilbert-base-uncased")
    """The question's tower."""
    text_layer: Annotated[int, Field(le=-1)] = -1
    """Hidden layer whose states are read, counted from the end: the top of a tower tuned for another task forgets words."""
    decoder: LanguageModelConfig = LanguageModelConfig(source="gpt2")
    """GPT-2; cross-attention is added, fresh."""
    fusion: Literal["concat", "mean"] = "concat"
    """`concat`: the decoder attends to all tokens of both. `mean`: to one vector, both sides averaged (the textbook's)."""
    freeze: Freezing = "nothing"
    """What does not learn: both encoders, one of them, the decoder but for its cross-attention, all but the projections."""
    image: ImageConfig = ImageConfig()
    """The picture's preparation; saved with the model and used in serving."""
    standardize: bool = False
    """Begin the questions' projection at states of mean 0 and deviation 1: a pretrained tower's share a large common part."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Every dropout of all three; None: as their own configurations say."""
    max_question_tokens: Annotated[int, Field(ge=2)] = 32
    """Longer questions are cut."""
    max_answer_tokens: Annotated[int, Field(ge=1)] = 8
    """Longest answer, end of text included."""


class ProjectorConfig(Section):
    """From the picture tower's tokens to the language model's."""

    kind: Literal["linear", "mlp", "pixel_shuffle"] = "mlp"
    """A matrix, two with GELU between (LLaVA 1.5), or r × r neighbours made one token and then a matrix."""
    shuffle: Annotated[int, Field(ge=1)] = 2
    """r of `pixel_shuffle`: r² times fewer tokens."""


class OutputConfig(Section):
    """Answers that are pictures: a routing token decides, a projector maps the states there to what a picture generator reads.

    GILL (Koh et al. 2023), NExT-GPT (Wu et al. 2023) and DreamLLM (Dong et al. 2023) do so for diffusion models; the space here
    is a dual encoder's, and its nearest picture is shown.
    """

    clip: str
    """The dual encoder whose space is mapped to (a model, checkpoint or run folder); beside the model, not in it."""
    tokens: Annotated[int, Field(ge=1, le=64)] = 4
    """Routing tokens in a row. The first is the decision and is learned as a word; the others are put behind it."""
    layers: tuple[int, ...] = (-1,)
    """Hidden layers whose states at these tokens are read, counted from the end, side by side."""
    hidden: Annotated[int, Field(ge=1)] = 1024
    """Width inside the projector."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside the projector."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the projector's loss against the words' cross-entropy."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Of the projector's contrastive loss."""


class MllmModelConfig(Section):
    """Picture tower → projector → a causal language model that reads the picture's tokens among the words."""

    kind: Literal["mllm"] = "mllm"
    checkpoint: str | None = None
    """Start from a saved multimodal LLM, as stage 2 does from stage 1; then tower, projector and language are not read."""
    vision: TowerConfig = TowerConfig(source="asset:mobilenet_v2")
    """The picture's tower: ViT, CLIP, SigLIP, MobileNetV2, …, or fmray's dual encoder, whose picture tower is taken."""
    vision_layer: int = -1
    """Hidden layer whose tokens are read, counted from the end (LLaVA: -2); convolutional towers have -1 alone."""
    language: LanguageModelConfig = LanguageModelConfig(source="asset:smollm2_135m")
    """The language model."""
    projector: ProjectorConfig = ProjectorConfig()
    """Between the two."""
    fusion: Literal["concat", "cross_attention"] = "concat"
    """`concat`: picture tokens stand in the sequence. `cross_attention`: gated layers between the blocks read them (Flamingo)."""
    cross_attention_every: Annotated[int, Field(ge=1)] = 4
    """Blocks between two gated layers."""
    image: ImageConfig = ImageConfig()
    """The picture's preparation; saved with the model and used in serving."""
    lora: LoraConfig | None = None
    """Learn an adapter of the language model instead of all its weights; it is merged into the saved model."""
    output: OutputConfig | None = None
    """Answer with pictures too; None: with words alone, or as `checkpoint` does."""
    template: Literal["chat", "plain"] = "chat"
    """`chat`: the tokenizer's chat template. `plain`: the texts as they are, one after the other (captions, LLaVA's stage 1)."""
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """Longest dialogue, picture tokens included; whole turns are left out at its end, never parts of a picture."""
    max_answer_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer when generating."""
    row_tokens: Annotated[int, Field(ge=8)] | None = None
    """Pack dialogues into rows of this many tokens, none of which sees another; None: one group per row."""


def model_kind(value: Any) -> str:
    """The `kind` of a model given as keys or as a section; vqa where it is not said."""
    return str(value.get("kind", "vqa") if isinstance(value, dict) else getattr(value, "kind", ""))


AnswerModelConfig = Annotated[
    Annotated[VqaModelConfig, Tag("vqa")] | Annotated[MllmModelConfig, Tag("mllm")], Discriminator(model_kind)
]

MODEL_KINDS = ("vqa", "mllm")


class AnswerEvaluateConfig(Section):
    """How a model's answers are measured."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    """Questions answered at once."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Only this many of the test split, evenly spread; None: all."""
    beams: Annotated[int, Field(ge=1)] = 1
    """Beams of the generation; 1: greedy."""
    choices: Annotated[int, Field(ge=2)] | None = None
    """Also rank this many captions by likelihood, the right one among them (caption sources); None: no."""
    gallery: Annotated[int, Field(ge=0)] = 24
    """Wrong answers kept with their pictures, for the report."""


class AnswersEvaluateRunConfig(Section):
    """A whole evaluation of a saved model that answers about pictures."""

    task: Literal["answers"] = "answers"
    """What tells this configuration from that of pairs (`fmray evaluate` reads both)."""
    checkpoint: str
    """A model folder, a checkpoint folder, or a run folder (its last good checkpoint)."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Local or Ray, workers, devices."""
    run: RunConfig = RunConfig(name="evaluate")
    """Where the results are written."""
    report: ReportConfig = ReportConfig()
    """Where metrics go."""
    data: DialogueDataConfig = DialogueDataConfig()
    """Data set to measure on: its test split; the blind baselines learn from its training split."""
    evaluate: AnswerEvaluateConfig = AnswerEvaluateConfig()
    """How."""


class AnswersConfig(Section):
    """A whole training of a model that answers about pictures."""

    task: Literal["answers"] = "answers"
    """What tells this configuration from that of pairs (`fmray pretrain` reads both)."""
    run: RunConfig = RunConfig(name="answers")
    """Name, storage, seed."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Local or Ray, workers, devices."""
    report: ReportConfig = ReportConfig()
    """Where metrics go."""
    data: DialogueDataConfig = DialogueDataConfig()
    """Questions, pictures, batches."""
    model: AnswerModelConfig = VqaModelConfig()
    """VQA model or multimodal LLM; `model.kind` selects."""
    parts: dict[str, PartConfig] = Field(default_factory=dict)
    """What learns, how fast, part by part. VQA: vision, text, vision_projection, text_projection, decoder.
    LLM: vision, projector, language, cross_attention, output. A part that is not named learns at `optimizer.lr`."""
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.01)
    """AdamW and its schedule."""
    engine: EngineConfig = EngineConfig()
    """Plain torch or DeepSpeed."""
    train: TrainConfig = TrainConfig()
    """Steps, checkpoints."""
    evaluate: AnswerEvaluateConfig = AnswerEvaluateConfig()
    """How the model is measured at the end and on the way."""

    @property
    def learning(self) -> dict[str, PartConfig]:
        """`parts` with the model's freezing in it."""
        frozen = FREEZINGS[self.model.freeze] if isinstance(self.model, VqaModelConfig) else {}
        return {**{part: PartConfig(train=how) for part, how in frozen.items()}, **self.parts}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.model, VqaModelConfig):
            both = sorted(FREEZINGS[self.model.freeze].keys() & self.parts.keys())
            if both:
                cure = f"model.freeze={self.model.freeze} speaks of it already: say it in one place"
                raise ConfigError(f"parts.{both[0]}", self.parts[both[0]].train, cure)
        if isinstance(self.data.source, RequestSource):
            words_alone = isinstance(self.model, VqaModelConfig) or (
                self.model.output is None and self.model.checkpoint is None
            )
            if words_alone:
                cure = "asks for pictures: set model.kind=mllm and model.output.clip"
                raise ConfigError("data.source.kind", "requests", cure)
        counts = self.runtime.worker_counts
        if any(self.data.batch_size % count for count in counts):
            cure = f"must divide among the workers: take a multiple of {math.lcm(*counts)}"
            raise ConfigError("data.batch_size", self.data.batch_size, cure)
        if self.engine.offload != "none" and self.engine.kind != "deepspeed":
            raise ConfigError("engine.offload", self.engine.offload, "needs engine.kind=deepspeed")
        if self.engine.offload == "all" and self.engine.zero_stage != 3:
            raise ConfigError("engine.offload", "all", "needs engine.zero_stage=3; use offload=optimizer")
        return self
