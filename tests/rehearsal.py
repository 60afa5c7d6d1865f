"""A rank of a PPO run without its loop: learner, pools and one judged batch, for tests that look inside an iteration."""

from __future__ import annotations

from typing import Any

import torch

from fmray.config.rlhf import RlhfConfig
from fmray.rlhf.experience import Judged
from fmray.rlhf.learner import PpoLearner, make_learner
from fmray.rlhf.ppo import PpoBatch, give_credit
from fmray.rlhf.publishing import publish, weight_buckets
from fmray.rlhf.roles import pool_plan
from fmray.runtime.context import WorkerContext
from fmray.runtime.pool import LocalPools
from fmray.runtime.run_folder import RunFolder
from fmray.types import Metrics


def rank_context(config: RlhfConfig, rank: int = 0, world_size: int = 1) -> WorkerContext:
    """Rank `rank` with pools of its own in this process."""
    cpu = torch.device("cpu")
    return WorkerContext(rank, world_size, cpu, RunFolder.of(config.run), LocalPools(pool_plan(config), cpu))


def started(config: RlhfConfig, rank: int = 0, world_size: int = 1) -> tuple[PpoLearner, WorkerContext]:
    """A fresh learner whose weights are published as version 0."""
    context = rank_context(config, rank, world_size)
    learner = make_learner(config, context)
    if world_size == 1:
        publish(learner.model.policy, learner.engine, 0, config, context)
    else:  # without Ray each rank has a store of its own
        buckets = weight_buckets(learner.model.policy, learner.engine, config)
        context.pools.weights.publish(0, buckets)
    return learner, context


def credited(
    learner: PpoLearner, context: WorkerContext, iteration: int = 0
) -> tuple[Judged, PpoBatch, Metrics]:
    """Act, judge, credit."""
    learner.crew.ask_ahead(iteration, version=iteration, last=10**6)
    judged = learner.crew.judge(learner.crew.act(iteration))
    judgement = learner.bank.combine(judged.raw, judged.rollouts, judged.failures)
    batch, metrics = give_credit(judged, judgement, learner, iteration, context)
    return judged, batch, metrics


def weights_of(learner: PpoLearner) -> dict[str, Any]:
    """Copies of what learns, by name; a collective under ZeRO."""
    return {name: tensors["weight"].clone() for name, tensors in learner.engine.tensors()}
