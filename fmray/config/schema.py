"""What a run can be told: one pydantic section per concern, a doc under each field, unknown keys refused.

A function receives its own section only; the root (`PretrainConfig`, …) is seen by `jobs/`, `cli.py` and the loops.
This file holds the model, the learning and the roots, and is the one address of all sections.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fmray.config.base import ReportConfig, RunConfig, RuntimeConfig, Section
from fmray.config.data import (
    SOURCE_KINDS,
    AugmentConfig,
    DataConfig,
    EmojiSource,
    FolderSource,
    HubSource,
    JsonlSource,
    ParquetSource,
    SourceConfig,
    WebDatasetSource,
    source_kind,
)
from fmray.errors import ConfigError

__all__ = [
    "SOURCE_KINDS",
    "AugmentConfig",
    "DataConfig",
    "EmojiSource",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluateRunConfig",
    "FolderSource",
    "HubSource",
    "ImageConfig",
    "JsonlSource",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParquetSource",
    "PartConfig",
    "PartName",
    "PretrainConfig",
    "ReportConfig",
    "RunConfig",
    "RuntimeConfig",
    "Section",
    "SourceConfig",
    "TowerConfig",
    "TrainConfig",
    "WebDatasetSource",
    "source_kind",
]

# ----------------------------------------------------------------------------------------------------------- the model


class TowerConfig(Section):
    """One tower of a dual encoder."""

    source: str
    """`asset:minilm`, `asset:multilingual_sentences`, `asset:mobilenet_v2`, a hub id, or a local folder with a config.json."""
    pretrained: bool = True
    """Load the weights; False keeps the architecture alone."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the tower's transformers configuration to change (from-scratch towers: `hidden_size`, …)."""
    pooling: Literal["auto", "cls", "mean", "eos", "last"] = "auto"
    """How a sequence becomes one vector; `mean` goes by the attention mask; `auto`: the architecture's own way."""


class ImageConfig(Section):
    """How a picture becomes numbers."""

    size: Annotated[int, Field(ge=8)] = 224
    """Side of the square input, in pixels."""
    fit: Literal["crop", "stretch", "pad"] = "crop"
    """`crop`: shorter side to size, centre cut; `pad`: longer side to size, white borders; `stretch`: both."""
    normalize: Literal["imagenet", "clip", "half", "none", "custom"] = "imagenet"
    """Statistics subtracted and divided by: ImageNet's, OpenAI CLIP's, 0.5/0.5, nothing, or `mean` and `std`."""
    mean: tuple[float, float, float] | None = None
    """With `normalize=custom`."""
    std: tuple[float, float, float] | None = None
    """With `normalize=custom`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        custom = self.normalize == "custom"
        if custom != (self.mean is not None) or custom != (self.std is not None):
            cure = "give both with normalize=custom, and neither otherwise"
            raise ConfigError("model.image.mean/std", (self.mean, self.std), cure)
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError("model.image.std", self.std, "must be positive")
        return self


class ModelConfig(Section):
    """A dual encoder: two towers and a shared space, or a whole CLIP/SigLIP checkpoint."""

    checkpoint: str | None = None
    """A saved dual encoder, or a hub CLIP/SigLIP checkpoint; then the towers below are not read."""
    vision: TowerConfig = TowerConfig(source="asset:mobilenet_v2")
    """The picture's tower."""
    text: TowerConfig = TowerConfig(source="asset:minilm")
    """The caption's tower."""
    image: ImageConfig = ImageConfig()
    """The picture's preparation; saved with the model and used in serving."""
    embed_dim: Annotated[int, Field(ge=1)] = 384
    """Width of the shared space."""
    vision_projection: Literal["linear", "affine"] = "linear"
    """`affine` adds a bias to the matrix (a ridge start needs it)."""
    text_projection: Literal["linear", "affine", "identity", "from_identity"] = "linear"
    """`identity` keeps the text tower's own space, `from_identity` learns a matrix from there (width = embed_dim)."""
    fold_batch_norm: bool = False
    """Merge a pretrained convolutional tower's BatchNorm into its convolutions: the same function, faster."""
    warm_start: Literal["none", "ridge"] = "none"
    """`ridge`: start the picture's projection at the closed-form regression onto the captions' embeddings."""
    ridge_strength: Annotated[float, Field(gt=0)] = 0.05
    """Regularisation of the ridge start, in units of the features' mean variance."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the pooled features before the projections."""
    tower_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout inside both towers; None: as their own configuration says."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warm_start == "ridge" and self.vision_projection != "affine":
            raise ConfigError("model.warm_start", "ridge", "needs model.vision_projection=affine")
        if self.fold_batch_norm and not self.vision.pretrained:
            raise ConfigError(
                "model.fold_batch_norm", True, "needs a pretrained vision tower: its statistics are folded"
            )
        return self


class PartConfig(Section):
    """How one part of the model learns: `vision`, `text`, `vision_projection`, `text_projection` or `temperature`."""

    train: (
        Literal["all", "none", "cross_attention"] | Annotated[str, Field(pattern=r"^last:[1-9][0-9]*$")]
    ) = "all"
    """`all`, `none` (locked), `last:N` (the last N blocks of a tower), `cross_attention` (that of a decoder alone)."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """Learning rate of this part; None: `optimizer.lr`."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of this part; None: `optimizer.weight_decay`. Biases, norms and scalars never decay."""


PartName = Literal["vision", "text", "vision_projection", "text_projection", "temperature"]


class ObjectiveConfig(Section):
    """What pulls matching pairs together."""

    kind: Literal["infonce", "siglip"] = "infonce"
    """`infonce`: softmax over all pairs of the global batch (CLIP). `siglip`: a sigmoid per pair."""
    positives: Literal["pair", "caption"] = "caption"
    """`caption`: rows with the same caption are positives of each other; `pair`: row i belongs to row i alone."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Starting temperature; None: 0.07 for infonce, 0.1 for siglip, or the checkpoint's."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over all rows (infonce)."""
    grad_cache_chunk: Annotated[int, Field(ge=1)] | None = None
    """GradCache: rows per worker that are in memory at once; the loss still sees the whole batch. None: off."""


# -------------------------------------------------------------------------------------------------------- the learning


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Decay of the running mean and of the running square."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay; never on biases, norms and scalars."""
    schedule: Literal["constant", "linear", "cosine", "hold"] = "cosine"
    """Shape after the warm-up, down to `final_lr_share`; `hold`: at the peak, and linear over the last third alone."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear rise."""
    final_lr_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step, as a share of the peak."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Exponential moving average of the weights; the average is evaluated and saved as the model. None: off."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0: no clipping (written out for DeepSpeed too, which clips by default)."""


class EngineConfig(Section):
    """What holds the weights and steps them."""

    kind: Literal["torch", "deepspeed"] = "torch"
    """`torch`: whole copies, averaged gradients. `deepspeed`: ZeRO."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed shards: 0 nothing, 1 optimizer, 2 and gradients, 3 and parameters."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """ZeRO 2-3: optimizer state (`all`: ZeRO-3 parameters too) in CPU memory, on GPU machines."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast over fp32 weights."""
    activation_checkpointing: bool = False
    """Recompute the towers' activations in the backward pass, to save memory."""


class TrainConfig(Section):
    """How long, and what happens on the way."""

    steps: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps in all."""
    log_every: Annotated[int, Field(ge=1)] = 1
    """Steps between two lines of metrics."""
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two evaluations; None: at the end only."""
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two checkpoints; None: at the end only."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Older checkpoints are deleted."""


class EvaluateConfig(Section):
    """How a model is measured."""

    batch_size: Annotated[int, Field(ge=1)] = 128
    """Samples embedded at once."""
    languages: tuple[Literal["en", "ko", "ja", "zh", "de", "fr", "es", "it", "pt"], ...] = ("en",)
    """Emoji names to retrieve by; each language is measured alone."""
    templates: tuple[str, ...] = ("{}",)
    """Sentences around a caption or class name; their normalised embeddings are averaged."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Only the first samples of the test split; None: all."""

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> Self:
        for template in self.templates:
            if template.count("{}") != 1:
                raise ConfigError("evaluate.templates", template, "write {} once, where the name goes")
        if not self.templates:
            raise ConfigError("evaluate.templates", self.templates, "give at least one, such as '{}'")
        return self


# --------------------------------------------------------------------------------------------------------------- roots


class PretrainConfig(Section):
    """A whole contrastive pretraining run."""

    task: Literal["pairs"] = "pairs"
    """What tells this configuration from those of other trainings (`fmray pretrain` reads them all)."""
    run: RunConfig = RunConfig()
    """Name, storage, seed."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Local or Ray, workers, devices."""
    report: ReportConfig = ReportConfig()
    """Where metrics go."""
    data: DataConfig = DataConfig()
    """Data set and batches."""
    model: ModelConfig = ModelConfig()
    """The dual encoder."""
    parts: dict[PartName, PartConfig] = Field(default_factory=dict)
    """What learns, how fast, part by part; a part that is not named learns at `optimizer.lr`."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    engine: EngineConfig = EngineConfig()
    """Plain torch or DeepSpeed."""
    train: TrainConfig = TrainConfig()
    """Steps, checkpoints."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How the model is measured at the end and on the way."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        counts = self.runtime.worker_counts
        if any(self.data.batch_size % count for count in counts):
            many = f"every number of workers from {counts[0]} to {counts[-1]}"
            among = f"{counts[0]} workers" if len(counts) == 1 else many
            cure = f"must divide among {among}: take a multiple of {math.lcm(*counts)}"
            raise ConfigError("data.batch_size", self.data.batch_size, cure)
        if self.engine.offload != "none" and self.engine.kind != "deepspeed":
            raise ConfigError("engine.offload", self.engine.offload, "needs engine.kind=deepspeed")
        if self.engine.offload != "none" and self.engine.zero_stage < 2:
            raise ConfigError("engine.offload", self.engine.offload, "needs engine.zero_stage 2 or 3")
        if self.engine.offload == "all" and self.engine.zero_stage != 3:
            raise ConfigError("engine.offload", "all", "needs engine.zero_stage=3; use offload=optimizer")
        return self


class EvaluateRunConfig(Section):
    """A whole evaluation of a saved model."""

    task: Literal["pairs"] = "pairs"
    """What tells this configuration from those of other models (`fmray evaluate` reads them all)."""
    checkpoint: str
    """A model folder, a checkpoint folder, or a run folder (its last good checkpoint)."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Local or Ray, workers, devices."""
    run: RunConfig = RunConfig(name="evaluate")
    """Where the results are written."""
    report: ReportConfig = ReportConfig()
    """Where metrics go."""
    data: DataConfig = DataConfig()
    """Data set to measure on (its test split)."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How."""
