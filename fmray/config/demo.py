"""The demo: each part's own configuration, in one tree."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fmray.config.answers import AnswersConfig
from fmray.config.base import RunConfig, Section
from fmray.config.reward import RewardModelConfig
from fmray.config.rewards import LikelihoodReward, RewardConfig
from fmray.config.rlhf import RlhfConfig
from fmray.config.schema import PretrainConfig
from fmray.config.sweep import SweepConfig
from fmray.errors import ConfigError

SENTIMENT, GRAMMAR = "sentiment", "grammar"
"""Names of the two rewards that second judges stand beside."""
Part = Literal["clip", "vqa", "rlhf"]
RUNS = ("clip", "vqa", "reward", "rlhf", "sweep")
"""Keys of the runs."""
NOT_ASKED = ("captions", "requests")
"""Sources of dialogues that are no questions with an answer in words."""


def _parts(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


class SecondOpinionConfig(Section):
    """Judges of the same kinds that the policy was not trained against; they look at its answers to held-out prompts."""

    encoder: str = "asset:multilingual_sentences"
    """Frozen sentence encoder under the sentiment probe, a logistic regression."""
    probe_reviews: Annotated[int, Field(ge=20)] = 2000
    """Reviews of each source that the probe learns from."""
    counted_reviews: Annotated[int, Field(ge=20)] = 10_000
    """IMDB reviews, none of them the reward model's, whose words are counted for a judge without an encoder."""
    grammar: RewardConfig = LikelihoodReward()
    """The second judge of grammar; any kind of reward."""


class DemoConfig(Section):
    """The whole road: CLIP and a VQA model trained, measured, served; a reward model, PPO under it, its verdict, a sweep."""

    run: RunConfig = RunConfig(name="demo")
    """Name, storage, seed of all parts; their runs are folders in this one."""
    parts: Annotated[tuple[Part, ...], BeforeValidator(_parts), Field(min_length=1)] = (
        "clip",
        "vqa",
        "rlhf",
    )
    """Some of `clip`, `vqa`, `rlhf`; the report shows these."""
    clip: PretrainConfig
    """The dual encoder."""
    vqa: AnswersConfig
    """The model that answers questions about pictures."""
    reward: RewardModelConfig
    """The sentiment reward model."""
    rlhf: RlhfConfig
    """PPO; a reward whose source is `runs/reward_sentiment` judges with the model that this demo has trained."""
    second: SecondOpinionConfig = SecondOpinionConfig()
    """Who looks at the answers before and after PPO."""
    sweep: SweepConfig
    """Short PPO runs: `sweep.base` lies over the demo's `rlhf`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for part in RUNS:
            run = getattr(self, part).run
            for key in ("storage", "seed", "fresh"):
                if getattr(run, key) != RunConfig.model_fields[key].default:
                    cure = f"all parts have the demo's; write run.{key}=…"
                    raise ConfigError(f"{part}.run.{key}", getattr(run, key), cure)
        if "://" in self.run.storage:
            cure = "the demo's page and endpoint are on this machine: give a folder"
            raise ConfigError("run.storage", self.run.storage, cure)
        names = [getattr(self, part).run.name for part in RUNS]
        if len(set(names)) < len(names):
            raise ConfigError("rlhf.run.name", self.rlhf.run.name, f"the parts' names must differ: {names}")
        if self.vqa.data.source.kind in NOT_ASKED:
            cure = "the demo asks questions: take easy_vqa, vqa_v2, hub_vqa, llava or labels"
            raise ConfigError("vqa.data.source.kind", self.vqa.data.source.kind, cure)
        if self.vqa.evaluate.choices is not None:
            cure = "ranks captions, and the demo asks questions: leave it out"
            raise ConfigError("vqa.evaluate.choices", self.vqa.evaluate.choices, cure)
        self._check_rlhf()
        return self

    def _check_rlhf(self) -> None:
        missing = [name for name in (SENTIMENT, GRAMMAR) if name not in self.rlhf.rewards]
        if missing:
            cure = f"the second judges stand beside rewards of the names {SENTIMENT} and {GRAMMAR}"
            raise ConfigError("rlhf.rewards", list(self.rlhf.rewards), cure)
        if not self.rlhf.train.evaluate_prompts:
            raise ConfigError("rlhf.train.evaluate_prompts", 0, "the verdict is about held-out prompts")
        if self.sweep.root != "rlhf" or self.sweep.recipe or self.sweep.file:
            cure = "the demo sweeps its own PPO run: leave sweep.root, sweep.recipe and sweep.file alone"
            raise ConfigError("sweep.root", self.sweep.root, cure)
