"""Recipes of PPO runs: functions that return a whole configuration."""

from __future__ import annotations

from collections.abc import Callable

from fmray.config.base import RunConfig, RuntimeConfig
from fmray.config.pools import PoolConfig
from fmray.config.prompts import PromptConfig, QuestionPromptSource, ReviewPromptSource
from fmray.config.rewards import (
    AnswerReward,
    ClassifierReward,
    GrammarReward,
    LengthReward,
    LikelihoodReward,
    RepetitionReward,
)
from fmray.config.rlhf import (
    CriticConfig,
    IterationConfig,
    KlConfig,
    LoraConfig,
    PolicyConfig,
    PpoConfig,
    ReferenceConfig,
    RlhfConfig,
    RolloutConfig,
)
from fmray.config.schema import EngineConfig, OptimizerConfig

SENTIMENT_RUN = "runs/reward_sentiment"
"""Where `fmray reward --recipe reward_sentiment` leaves its model."""
WEAK_RUN = "runs/mllm_weak"
"""A multimodal LLM of stage 2 whose training was stopped early: it answers, and is often wrong."""


def ppo_reviews() -> RlhfConfig:
    """FLAN-T5-small continues movie reviews: kinder (our own sentiment model) and in good grammar, near where it started."""
    return RlhfConfig(
        run=RunConfig(name="ppo_reviews"),
        prompts=PromptConfig(
            source=ReviewPromptSource(), template="Continue the movie review: {}", max_tokens=48
        ),
        policy=PolicyConfig(source="asset:flan_t5_small", freeze_embeddings=True),
        critic=CriticConfig(kind="shared"),
        reference=ReferenceConfig(precision="bf16"),
        rollout=RolloutConfig(batch_size=64, request_size=32, max_new_tokens=24, precision="bf16"),
        engine=EngineConfig(precision="bf16"),
        rewards={
            "sentiment": ClassifierReward(source=SENTIMENT_RUN, label="positive"),
            "grammar": GrammarReward(weight=1.0),
            "length": LengthReward(weight=0.3, min_tokens=10, normalize="none"),
            "repetition": RepetitionReward(weight=0.5, normalize="none"),
        },
        ppo=PpoConfig(
            mini_batch_size=32,
            entropy_coefficient=0.008,  # without it the answers become each other's: distinct-2 fell by a quarter
            kl=KlConfig(coefficient=0.1, controller="adaptive", target=4.5, horizon=150),
        ),
        optimizer=OptimizerConfig(
            lr=1.5e-4, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, schedule="linear", warmup_steps=4
        ),
        train=IterationConfig(iterations=20, evaluate_prompts=128, checkpoint_every=10),
    )


def ppo_reviews_gpt() -> RlhfConfig:
    """The same task for a decoder-only policy: SmolLM2-135M with a LoRA adapter, which is its own reference."""
    t5 = ppo_reviews()
    return t5.replace(
        run=RunConfig(name="ppo_reviews_gpt"),
        prompts=t5.prompts.replace(template="{}"),
        policy=PolicyConfig(source="asset:smollm2_135m", lora=LoraConfig()),
        reference=ReferenceConfig(kind="adapter_off"),
        optimizer=t5.optimizer.replace(lr=2e-4),
    )


def ppo_hub_rewards() -> RlhfConfig:
    """FLAN-T5 under two reward models of the hub: acceptability (CoLA) and sentiment (needs the hub)."""
    t5 = ppo_reviews()
    return t5.replace(
        run=RunConfig(name="ppo_hub_rewards"),
        policy=PolicyConfig(source="google/flan-t5-small"),
        rewards={
            "sentiment": ClassifierReward(
                source="cardiffnlp/twitter-roberta-base-sentiment", label="LABEL_2"
            ),
            "acceptability": ClassifierReward(source="textattack/roberta-base-CoLA", label="LABEL_1"),
        },
    )


def ppo_demo() -> RlhfConfig:
    """ppo_reviews under Ray: a learner under DeepSpeed ZeRO-2, and a pool each for rollouts, reference and rewards."""
    small = PoolConfig(cpus=0.25, threads=1)
    two = PoolConfig(cpus=0.25, threads=2)
    t5 = ppo_reviews()
    return t5.replace(
        run=RunConfig(name="ppo_demo"),
        runtime=RuntimeConfig(kind="ray", workers=1, cpus_per_worker=0.5, threads=2),
        engine=EngineConfig(kind="deepspeed", zero_stage=2, precision="bf16"),
        reference=t5.reference.replace(pool=small),
        rollout=t5.rollout.replace(pool=two),
        rewards={
            name: reward.replace(pool=small) if reward.pool.replicas else reward
            for name, reward in t5.rewards.items()
        },
    )


def fluent_reviews() -> RlhfConfig:
    """ppo_reviews with SmolLM2's likelihood as the grammar reward instead of the edit tagger."""
    t5 = ppo_reviews()
    return t5.replace(
        run=RunConfig(name="fluent_reviews"), rewards={**t5.rewards, "grammar": LikelihoodReward(weight=0.5)}
    )


def ppo_easy_vqa() -> RlhfConfig:
    """A multimodal LLM taught by rewards to answer easy-vqa's questions: 1 for the right word, 0 else; an adapter learns."""
    t5 = ppo_reviews()
    return t5.replace(
        run=RunConfig(name="ppo_easy_vqa"),
        prompts=PromptConfig(source=QuestionPromptSource()),
        policy=PolicyConfig(source=WEAK_RUN, lora=LoraConfig()),
        reference=ReferenceConfig(kind="adapter_off"),
        rollout=t5.rollout.replace(max_new_tokens=4),
        rewards={"answer": AnswerReward()},
        ppo=PpoConfig(
            mini_batch_size=32,
            # an answer is a word: two nats are the way from one in seven to certainty
            kl=KlConfig(coefficient=0.05, controller="adaptive", target=0.5, horizon=300),
        ),
        optimizer=t5.optimizer.replace(lr=2e-4),
        train=IterationConfig(iterations=30, evaluate_prompts=128, evaluate_every=10, checkpoint_every=10),
    )


RLHF_RECIPES: dict[str, Callable[[], RlhfConfig]] = {
    "ppo_reviews": ppo_reviews,
    "ppo_reviews_gpt": ppo_reviews_gpt,
    "ppo_hub_rewards": ppo_hub_rewards,
    "fluent_reviews": fluent_reviews,
    "ppo_demo": ppo_demo,
    "ppo_easy_vqa": ppo_easy_vqa,
}
