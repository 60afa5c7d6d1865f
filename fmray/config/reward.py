"""A reward model's training: from what verdicts, which model, which loss."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from fmray.config.base import ReportConfig, RunConfig, RuntimeConfig, Section
from fmray.config.schema import EngineConfig, OptimizerConfig, TrainConfig
from fmray.errors import ConfigError

Words = Annotated[int, Field(ge=1)]


class ReviewVerdicts(Section):
    """Movie reviews labelled negative or positive (a pinned asset, no hub needed): Rotten Tomatoes, and pieces of IMDB's."""

    kind: Literal["reviews"] = "reviews"
    imdb: Annotated[int, Field(ge=0)] = 0
    """IMDB reviews to train on beside Rotten Tomatoes; each gives its last words, where the verdict tends to stand."""
    imdb_words: tuple[Words, Words] = (10, 30)
    """`[min, max]` words of such a piece, in training and in the held-out `imdb` part."""
    continuations: bool = False
    """Train on each review of Rotten Tomatoes once more without its first words: what a policy that goes on from them writes."""
    opening_words: tuple[Words, Words] = (4, 8)
    """`[min, max]` first words that a continuation lacks."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, (low, high) in (("imdb_words", self.imdb_words), ("opening_words", self.opening_words)):
            if low > high:
                raise ConfigError(f"data.source.{key}", [low, high], "write [min, max] with min <= max")
        return self


class JsonlVerdicts(Section):
    """Lines of JSON in `<path>/train*.jsonl`; every `<path>/test*.jsonl` is a held-out part of its own, by its name."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """Folder with the files."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Other names for the keys `text`, `label`, `prompt`, `chosen`, `rejected`, `answers`, `margin` (`{text: sentence}`)."""


class HubVerdicts(Section):
    """A dataset of the Hugging Face hub or a local `datasets` folder."""

    kind: Literal["hub"] = "hub"
    path: str
    """Hub id or local folder, as for `datasets.load_dataset`."""
    config_name: str | None = None
    """The dataset's configuration, where it has several."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Other names for the columns `text`, `label`, `prompt`, `chosen`, `rejected`, `answers`, `margin`."""
    train_split: str = "train"
    """Split to train on; slices (`train[:90%]`) work."""
    test_splits: tuple[str, ...] = ("test",)
    """Splits to measure on, each a held-out part."""


def verdict_kind(value: Any) -> str:
    """The `kind` of a source given as keys or as a section; reviews where it is not said."""
    return str(value.get("kind", "reviews") if isinstance(value, dict) else value.kind)


VerdictSourceConfig = Annotated[
    Annotated[ReviewVerdicts, Tag("reviews")]
    | Annotated[JsonlVerdicts, Tag("jsonl")]
    | Annotated[HubVerdicts, Tag("hub")],
    Discriminator(verdict_kind),
]

VERDICT_KINDS = ("reviews", "jsonl", "hub")
VERDICT_COLUMNS = ("text", "label", "prompt", "chosen", "rejected", "answers", "margin")


class RewardDataConfig(Section):
    """People's verdicts on texts."""

    kind: Literal["labelled", "pairs", "rankings"] = "labelled"
    """`labelled`: {text, label}. `pairs`: {prompt, chosen, rejected}. `rankings`: {prompt, answers: [best … worst]}."""
    source: VerdictSourceConfig = ReviewVerdicts()
    """Where they are; `data.source.kind` selects the type."""
    labels: tuple[str, ...] | None = None
    """Names of the labels, in the order of the model's outputs; None: as the data have them, sorted."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows (labelled texts, pairs, rankings) of one step, over all workers."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Rows in a worker's memory at once; None: its whole share. It changes no result."""
    bucket_batches: Annotated[int, Field(ge=1)] = 16
    """Rows of this many batches are sorted by length before they are cut, so that little is padding; 1: no sorting."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source.kind == "reviews" and self.kind != "labelled":
            raise ConfigError(
                "data.kind", self.kind, "reviews are labelled; take data.source.kind=jsonl or hub"
            )
        for column in getattr(self.source, "columns", {}):
            if column not in VERDICT_COLUMNS:
                known = ", ".join(VERDICT_COLUMNS)
                raise ConfigError(f"data.source.columns.{column}", column, f"unknown; there are: {known}")
        if self.labels is not None and (self.kind != "labelled" or len(set(self.labels)) < 2):
            raise ConfigError("data.labels", list(self.labels), "give two or more, with data.kind=labelled")
        return self


class RewardModelSection(Section):
    """A text model with one score per text, or one per label."""

    source: str = "asset:minilm"
    """An encoder, encoder-decoder or decoder-only model: an asset, a hub id, a local folder, or `arch:bert` and its like."""
    tokenizer: str | None = None
    """Where the tokenizer is; None: with the model (an `arch:` has none)."""
    pretrained: bool = True
    """Load the weights; False keeps the architecture alone."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the model's transformers configuration to change (from-scratch models: `hidden_size`, …)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = 0.0
    """Every dropout inside the model; 0: off, as PPO needs it of all its models; None: as the model's configuration says."""
    freeze_embeddings: bool = False
    """Leave the token embeddings as they are: they are half of a small model, and stepping them costs as much as learning."""
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of what stands on the pretrained body; None: `optimizer.lr`."""
    max_tokens: Annotated[int, Field(ge=2)] = 128
    """Longer texts lose their beginning."""


class RewardObjectiveConfig(Section):
    """The loss."""

    kind: Literal["auto", "classification", "pairwise", "all_pairs", "plackett_luce"] = "auto"
    """`auto`: classification for labelled texts, pairwise for pairs, all_pairs for rankings."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Score by which the better answer should lead (pairwise, all_pairs), where a row has no `margin` of its own."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over all labels (classification)."""


class NormalizeConfig(Section):
    """Gain and bias written into the saved model's config.json: gain · score + bias has mean 0 and deviation 1."""

    on: bool | None = None
    """None: for pairs and rankings, not for labelled texts (there the score is the second label's logit minus the first's)."""
    texts: str | None = None
    """A .jsonl file of reference texts, `{"text": …}` (answers of the policy that PPO starts from); None: training texts."""
    max_texts: Annotated[int, Field(ge=2)] = 512
    """Take so many of them, evenly spread."""


class RewardEvaluateConfig(Section):
    """How the model is measured on the held-out parts."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    """Texts scored at once."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Only this many rows of each part, evenly spread; None: all."""
    bins: Annotated[int, Field(ge=2)] = 10
    """Bins of confidence, for the accuracy by confidence and the calibration error."""


class RewardModelConfig(Section):
    """A whole training of a reward model."""

    run: RunConfig = RunConfig(name="reward")
    """Name, storage, seed."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Local or Ray, workers, devices."""
    report: ReportConfig = ReportConfig()
    """Where metrics go."""
    data: RewardDataConfig = RewardDataConfig()
    """Verdicts and batches."""
    model: RewardModelSection = RewardModelSection()
    """The scorer."""
    objective: RewardObjectiveConfig = RewardObjectiveConfig()
    """The loss."""
    trainer: Literal["auto", "fmray", "trl"] = "auto"
    """`fmray`: our loop over our engines. `trl`: its RewardTrainer (decoder-only, pairs); `auto` takes it for just those."""
    normalize: NormalizeConfig = NormalizeConfig()
    """The saved score's scale."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, weight_decay=0.01, schedule="linear")
    """AdamW and its schedule."""
    engine: EngineConfig = EngineConfig()
    """Plain torch or DeepSpeed."""
    train: TrainConfig = TrainConfig()
    """Steps, checkpoints."""
    evaluate: RewardEvaluateConfig = RewardEvaluateConfig()
    """How the model is measured at the end and on the way."""

    @property
    def loss(self) -> str:
        """The loss's name, `auto` resolved."""
        if self.objective.kind != "auto":
            return self.objective.kind
        return {"labelled": "classification", "pairs": "pairwise", "rankings": "all_pairs"}[self.data.kind]

    @property
    def normalizes(self) -> bool:
        """Whether gain and bias are written."""
        return self.data.kind != "labelled" if self.normalize.on is None else self.normalize.on

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_objective()
        self._check_sizes()
        if self.trainer == "trl" and (
            self.data.kind != "pairs" or self.objective.kind not in ("auto", "pairwise")
        ):
            raise ConfigError("trainer", "trl", "its RewardTrainer learns pairs only; use trainer=fmray")
        return self

    def _check_objective(self) -> None:
        fits = {
            "labelled": ("classification",),
            "pairs": ("pairwise", "all_pairs", "plackett_luce"),
            "rankings": ("all_pairs", "plackett_luce"),
        }[self.data.kind]
        if self.loss not in fits:
            cure = f"does not learn from data.kind={self.data.kind}; take {' or '.join(fits)}"
            raise ConfigError("objective.kind", self.objective.kind, cure)
        if self.objective.margin and self.loss not in ("pairwise", "all_pairs"):
            raise ConfigError("objective.margin", self.objective.margin, f"has no meaning for {self.loss}")
        if self.objective.label_smoothing and self.loss != "classification":
            smoothing = self.objective.label_smoothing
            raise ConfigError("objective.label_smoothing", smoothing, f"has no meaning for {self.loss}")

    def _check_sizes(self) -> None:
        counts = self.runtime.worker_counts
        if any(self.data.batch_size % count for count in counts):
            cure = f"must divide among the workers: take a multiple of {math.lcm(*counts)}"
            raise ConfigError("data.batch_size", self.data.batch_size, cure)
        if self.engine.offload != "none" and self.engine.kind != "deepspeed":
            raise ConfigError("engine.offload", self.engine.offload, "needs engine.kind=deepspeed")
        if self.engine.offload == "all" and self.engine.zero_stage != 3:
            raise ConfigError("engine.offload", "all", "needs engine.zero_stage=3; use offload=optimizer")
