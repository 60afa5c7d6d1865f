"""A PPO run: who acts, who judges, how credit is given, how it is learned."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fmray.config.base import ReportConfig, RunConfig, RuntimeConfig, Section
from fmray.config.pools import PoolConfig
from fmray.config.prompts import PromptConfig
from fmray.config.rewards import RewardConfig
from fmray.config.schema import EngineConfig, OptimizerConfig
from fmray.errors import ConfigError


class LoraConfig(Section):
    """Learn a low-rank adapter beside frozen weights; only the adapter travels to the pools."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of each update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers; None: peft's choice for the architecture."""


class PolicyConfig(Section):
    """The model that acts and learns."""

    source: str = "asset:flan_t5_small"
    """An encoder-decoder or decoder-only language model: an asset, a hub id, or a local folder."""
    lora: LoraConfig | None = None
    """Learn an adapter instead of all weights."""
    freeze_embeddings: bool = False
    """Leave token embeddings and output matrix as they are: less to step and to publish."""


class CriticConfig(Section):
    """What foresees the reward; advantages other than `gae` have none."""

    kind: Literal["separate", "shared"] = "separate"
    """`separate`: a model of its own with a scalar head. `shared`: a scalar head on the policy's last hidden states."""
    source: str | None = None
    """Where a separate critic starts: a language model or a reward model of the same tokenizer; None: the policy's source."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of critic and head; None: `optimizer.lr`."""


class ReferenceConfig(Section):
    """What the policy must not drift from."""

    kind: Literal["pool", "adapter_off"] = "pool"
    """`pool`: a frozen model in actors of its own. `adapter_off`: the learner itself without its adapter (needs LoRA)."""
    source: str | None = None
    """None: the policy's source."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of its matrices."""
    pool: PoolConfig = PoolConfig()
    """Its actors."""


class RolloutConfig(Section):
    """How the policy is sampled."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    """Samples of one iteration, over all learners: prompts × samples_per_prompt."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Answers to each prompt; the encoder runs once for them."""
    request_size: Annotated[int, Field(ge=1)] = 32
    """Samples of one request to the pool; requests are cut after sorting by length, samples of a prompt together."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """Longest answer."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling and of scoring alike."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the rollout policy's matrices, and of the weights that travel to it."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Iterations that generation may run ahead of learning; 0: synchronous."""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """Truncation of the importance weight exp(old_logp - rollout_logp) of stale or low-precision samples."""
    logp_limit: Annotated[float, Field(gt=0)] | None = 0.05
    """Largest mean |old_logp - rollout_logp| of samples that the current weights made; beyond it the run ends with an error."""
    bucket_mib: Annotated[int, Field(ge=1)] = 256
    """Weights travel in buckets of about this size."""
    pool: PoolConfig = PoolConfig()
    """Its actors."""


class KlConfig(Section):
    """The leash to the reference policy."""

    coefficient: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the penalty (where the adaptive controller starts)."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """k1 = log-ratio, k2 = its square / 2, k3 = ratio - 1 - log-ratio."""
    place: Literal["reward", "loss"] = "reward"
    """Taken from each token's reward, or added to the loss."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive`: the coefficient follows `target` (Ziegler 2019)."""
    target: Annotated[float, Field(gt=0)] = 6.0
    """Aimed-at KL of a whole answer, in nats."""
    horizon: Annotated[int, Field(ge=1)] = 10_000
    """Samples over which the coefficient adapts."""

    @model_validator(mode="after")
    def _has_a_gradient(self) -> Self:
        if self.place == "loss" and self.estimator == "k1":
            cure = "its gradient in the loss is zero on average: use k2 or k3, or ppo.kl.place=reward"
            raise ConfigError("ppo.kl.estimator", "k1", cure)
        return self


class PpoConfig(Section):
    """The arithmetic of learning."""

    compat: Literal["trl-1.12", "trl-0.11"] | None = None
    """Reproduce that trainer's conventions exactly; None: fmray's."""
    advantage: Literal["gae", "grpo", "rloo", "reinforce++"] = "gae"
    """`gae` learns a critic; the others compare the samples of a prompt or of the batch."""
    epochs: Annotated[int, Field(ge=1)] = 4
    """Passes over an iteration's samples."""
    mini_batch_size: Annotated[int, Field(ge=1)] = 32
    """Samples of one optimizer step, over all learners."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Samples in a learner's memory at once; None: its whole share. It changes no result."""
    clip: Annotated[float, Field(gt=0)] = 0.2
    """The policy's ratio is clipped to 1 ± this."""
    value_clip: Annotated[float, Field(gt=0)] = 0.2
    """New values are clipped to the old ones ± this."""
    value_coefficient: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the value loss."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE's λ."""
    whiten_advantages: bool = True
    """Mean 0, deviation 1 over all ranks' response tokens."""
    whiten_rewards: bool = False
    """Deviation 1 of the per-token rewards; the mean is kept."""
    missing_eos_penalty: float | None = None
    """Taken from the score of an answer that did not end by itself."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """Iterations in which only the critic learns."""
    kl: KlConfig = KlConfig()
    """The penalty for drifting."""


class IterationConfig(Section):
    """How long, and what happens on the way."""

    iterations: Annotated[int, Field(ge=1)] = 50
    """Rounds of act, judge, credit, learn, refresh."""
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    """Iterations between two evaluations on held-out prompts; None: before the first and after the last."""
    evaluate_prompts: Annotated[int, Field(ge=0)] = 64
    """Held-out prompts; 0: no evaluation."""
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    """Iterations between two checkpoints; None: at the end only."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Older checkpoints are deleted."""
    samples_every: Annotated[int, Field(ge=1)] = 5
    """Iterations between two tables of sample texts."""
    samples: Annotated[int, Field(ge=0)] = 4
    """Texts in a table."""


class RlhfConfig(Section):
    """A whole PPO run."""

    run: RunConfig = RunConfig(name="rlhf")
    """Name, storage, seed."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Local or Ray, learners, devices."""
    report: ReportConfig = ReportConfig()
    """Where metrics go."""
    prompts: PromptConfig = PromptConfig()
    """What is asked."""
    policy: PolicyConfig = PolicyConfig()
    """Who acts."""
    critic: CriticConfig = CriticConfig()
    """Who foresees."""
    reference: ReferenceConfig = ReferenceConfig()
    """Who keeps it in place."""
    rollout: RolloutConfig = RolloutConfig()
    """How it is sampled."""
    rewards: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], RewardConfig] = Field(
        default_factory=dict
    )
    """Who judges, by name."""
    ppo: PpoConfig = PpoConfig()
    """How it learns."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=1e-5, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, schedule="linear"
    )
    """AdamW and its schedule, counted in optimizer steps."""
    engine: EngineConfig = EngineConfig()
    """Plain torch or DeepSpeed."""
    train: IterationConfig = IterationConfig()
    """Iterations, checkpoints."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_rewards()
        self._check_sizes()
        if self.reference.kind == "adapter_off" and self.policy.lora is None:
            raise ConfigError(
                "reference.kind", "adapter_off", "needs policy.lora; or use reference.kind=pool"
            )
        grouped = self.ppo.advantage in ("grpo", "rloo")
        if grouped and self.rollout.samples_per_prompt < 2:
            cure = f"ppo.advantage={self.ppo.advantage} compares samples of a prompt: take at least 2"
            raise ConfigError("rollout.samples_per_prompt", self.rollout.samples_per_prompt, cure)
        if self.ppo.critic_warmup and self.ppo.advantage != "gae":
            raise ConfigError("ppo.critic_warmup", self.ppo.critic_warmup, "needs ppo.advantage=gae")
        if self.ppo.compat and (self.ppo.advantage != "gae" or self.ppo.kl.place != "reward"):
            raise ConfigError(
                "ppo.compat", self.ppo.compat, "needs ppo.advantage=gae and ppo.kl.place=reward"
            )
        return self

    def _check_rewards(self) -> None:
        if not self.rewards:
            cure = "name at least one, such as rewards.sentiment.kind=classifier; --help lists the kinds"
            raise ConfigError("rewards", {}, cure)
        if all(reward.weight == 0 for reward in self.rewards.values()):
            raise ConfigError("rewards", "every weight is 0", "give at least one a weight")

    def _check_sizes(self) -> None:
        rollout, ppo = self.rollout, self.ppo
        if rollout.request_size % rollout.samples_per_prompt:
            cure = f"must be a multiple of rollout.samples_per_prompt={rollout.samples_per_prompt}"
            raise ConfigError("rollout.request_size", rollout.request_size, cure)
        workers = math.lcm(*self.runtime.worker_counts)
        if rollout.batch_size % (rollout.request_size * workers):
            cure = f"must be a multiple of rollout.request_size={rollout.request_size} times {workers} learner(s)"
            raise ConfigError("rollout.batch_size", rollout.batch_size, cure)
        if rollout.batch_size % ppo.mini_batch_size or ppo.mini_batch_size % workers:
            cure = f"must divide rollout.batch_size={rollout.batch_size} and be a multiple of {workers} learner(s)"
            raise ConfigError("ppo.mini_batch_size", ppo.mini_batch_size, cure)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.ppo.epochs * (self.rollout.batch_size // self.ppo.mini_batch_size)
        return steps * self.train.iterations
