"""What is good: rewards by kind, each with its weight, normalisation and pool."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from fmray.config.base import Section
from fmray.config.pools import PoolConfig
from fmray.errors import ConfigError


class RewardBase(Section):
    """What every reward has. The combined reward of a sample is Σ weight · clip(normalised)."""

    weight: float = 1.0
    """Its share of the combined reward; 0: measured and logged only."""
    normalize: Literal["none", "running"] = "running"
    """`running`: minus the mean, over the deviation, of all this run's raw scores so far (saved with checkpoints)."""
    clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Largest absolute value after normalisation; None: no limit."""
    text: Literal["response", "prompt_and_response"] = "response"
    """What is scored; a space stands between prompt and response where neither brings one. Rules read the response alone."""
    pool: PoolConfig = PoolConfig()
    """Where it runs."""
    failure_budget: Annotated[int, Field(ge=0)] = 0
    """Samples that may fail to be scored in one run; they are left out of the learning, never scored zero."""


class ClassifierReward(RewardBase):
    """A sequence-classification model, ours or the hub's: the score of one label."""

    kind: Literal["classifier"] = "classifier"
    source: str
    """A model folder, a run folder of `fmray reward`, or a hub id (`cardiffnlp/twitter-roberta-base-sentiment`)."""
    label: str | int = 1
    """The label, by name or number."""
    output: Literal["logit", "margin", "log_probability", "probability"] = "margin"
    """`margin`: its logit minus the log-sum-exp of the others'; a model with one output is read as it is."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Longer texts lose their beginning."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Texts scored at once."""


class GrammarReward(RewardBase):
    """A grammar-edit tagger: mean P(keep) over the words; 1: nothing to mend. Empty: 1 / number of tags."""

    kind: Literal["grammar"] = "grammar"
    source: str = "asset:grammar_tagger"
    """A token-classification model with a KEEP label."""
    keep_label: str = "$KEEP"
    """The label that changes nothing."""
    output: Literal["probability", "log_probability"] = "probability"
    """`probability` is bounded, so one odd text does not set the scale of all; the log punishes a single wrong word more."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Longer texts lose their end."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Texts scored at once."""


class LikelihoodReward(RewardBase):
    """A causal language model's mean log-likelihood per token of the text: fluency. Empty: -log of the vocabulary."""

    kind: Literal["likelihood"] = "likelihood"
    source: str = "asset:smollm2_135m"
    """A causal language model."""
    max_tokens: Annotated[int, Field(ge=2)] = 256
    """Longer texts lose their end."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Texts scored at once."""


class LengthReward(RewardBase):
    """A rule: 0 inside [min, max] tokens of the response, EOS not counted; outside minus the distance, over `scale`."""

    kind: Literal["length"] = "length"
    min_tokens: Annotated[int, Field(ge=0)] = 8
    """Shortest answer without a loss."""
    max_tokens: Annotated[int, Field(ge=1)] = 1000
    """Longest answer without a loss."""
    scale: Annotated[float, Field(gt=0)] = 8.0
    """Tokens outside that cost 1."""
    pool: PoolConfig = PoolConfig(replicas=0)
    """Where it runs; by default at the learners."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_tokens > self.max_tokens:
            cure = f"must not be above max_tokens={self.max_tokens}"
            raise ConfigError("rewards.*.min_tokens", self.min_tokens, cure)
        return self


class RepetitionReward(RewardBase):
    """A rule: minus the share of the response's n-grams (of token ids) that occurred before in it; in [-1, 0]."""

    kind: Literal["repetition"] = "repetition"
    n: Annotated[int, Field(ge=1)] = 2
    """Tokens of an n-gram."""
    pool: PoolConfig = PoolConfig(replicas=0)
    """Where it runs; by default at the learners."""


class AnswerReward(RewardBase):
    """A rule: how right the response is by the prompt's own answers (questions about pictures have them); 0..1."""

    kind: Literal["answer"] = "answer"
    metric: Literal["exact", "vqa_accuracy", "anls"] = "exact"
    """`exact`: 1 for one of the answers, but for case. `vqa_accuracy`: the official rule over ten people. `anls`: by edits."""
    normalize: Literal["none", "running"] = "none"
    """`running`: minus the mean, over the deviation, of all this run's raw scores so far (saved with checkpoints)."""
    pool: PoolConfig = PoolConfig(replicas=0)
    """Where it runs; by default at the learners."""


class CallableReward(RewardBase):
    """Your own function: `score(texts: list[str], prompts: list[str]) -> list[float]`."""

    kind: Literal["python"] = "python"
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """Its import path, `my_package.rewards:politeness`."""


class HttpReward(RewardBase):
    """A scorer behind HTTP: POST {"texts": […], "prompts": […]} answers {"scores": […]}."""

    kind: Literal["http"] = "http"
    url: Annotated[str, Field(pattern=r"^https?://\S+$")]
    """Where it is asked, http or https; a redirect is not followed."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Sent along; `$NAME` stands for an environment variable of the process that asks."""
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest wait for one try."""
    tries: Annotated[int, Field(ge=1)] = 3
    """Tries, with growing pauses, before the samples count as failed; only what may pass (5xx, no answer) is tried again."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Texts in one request."""


def reward_kind(value: Any) -> str:
    """The `kind` of a reward given as keys or as a section; empty where it has none."""
    return str(value.get("kind", "") if isinstance(value, dict) else getattr(value, "kind", ""))


RewardConfig = Annotated[
    Annotated[ClassifierReward, Tag("classifier")]
    | Annotated[GrammarReward, Tag("grammar")]
    | Annotated[LikelihoodReward, Tag("likelihood")]
    | Annotated[LengthReward, Tag("length")]
    | Annotated[RepetitionReward, Tag("repetition")]
    | Annotated[AnswerReward, Tag("answer")]
    | Annotated[CallableReward, Tag("python")]
    | Annotated[HttpReward, Tag("http")],
    Discriminator(reward_kind),
]

REWARD_KINDS = ("classifier", "grammar", "likelihood", "length", "repetition", "answer", "python", "http")

KEPT_BY_EVERY_KIND = ("weight", "normalize", "clip", "text", "failure_budget")
"""Keys that stay when a reward of a recipe is given another kind."""
