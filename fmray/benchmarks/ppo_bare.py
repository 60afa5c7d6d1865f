"""A PPO iteration's model calls and nothing else: generate, the reference's forward, the learner's forwards, backwards, steps.

The same functions on the same tensors as the loop's, prepared before the clock starts. What the loop takes beyond them is its
overhead: requests, masks, advantages, losses, metrics, published weights.

B rows  P prompt tokens  T response tokens
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fmray.config.rlhf import RlhfConfig
from fmray.models.decoding.generate import Sampling, generate, make_decoder
from fmray.models.language import open_language_model, response_logits, response_states
from fmray.rlhf.credit import masks
from fmray.rlhf.learner import make_learner
from fmray.rlhf.losses import token_logp
from fmray.rlhf.ppo import inputs_of, micro_batches, mini_batches
from fmray.rlhf.publishing import publish
from fmray.rlhf.records import RolloutRequest, Rollouts
from fmray.rlhf.roles import ROLLOUT, RolloutPolicy, left_padded, pool_plan
from fmray.runtime.context import WorkerContext
from fmray.runtime.pool import LocalPools
from fmray.runtime.run_folder import RunFolder
from fmray.training.engine import rates_at

CPU = torch.device("cpu")
Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Calls:
    """One iteration's arguments."""

    tokens: int
    """Real response tokens."""
    prompts: list[tuple[Tensor, Tensor, Tensor]]
    """Of each request to the rollout policy: ids and mask [B, P], sample ids [B]."""
    judged: list[Rollouts]
    """What the reference is asked about."""
    credited: list[Inputs]
    """Of each forward without gradient."""
    learned: list[list[Inputs]]
    """Of each optimizer step, the forwards with gradient."""


class Bare:
    """`bare.seconds(bare.calls(iteration))`, with the weights that the run starts from. For one sample per prompt, on a CPU."""

    def __init__(self, config: RlhfConfig) -> None:
        self.config = config
        plan = pool_plan(config)
        self._context = WorkerContext(0, 1, CPU, RunFolder.of(config.run), LocalPools(plan, CPU))
        self._learner = make_learner(config, self._context)
        publish(self._learner.model.policy, self._learner.engine, 0, config, self._context)
        self._decoder = make_decoder(self._learner.model.policy, config.rollout.precision)
        self._reference = open_language_model(config.policy.source, "policy.source").model
        self._eos = self._learner.language.eos_id
        self._steps = 0

    def requests(self, iteration: int) -> list[RolloutRequest]:
        """What the loop asks of the rollout policy in that iteration."""
        return [request for _, request in self._learner.crew.requests(iteration, version=0)]

    def calls(self, iteration: int) -> Calls:
        """The loop's own road to every argument, not timed."""
        requests = self.requests(iteration)
        pool = self._context.pools[ROLLOUT]
        made = [pool.submit(RolloutPolicy.generate, request, phase="act").result() for request in requests]
        together = Rollouts.together(made)
        rollouts = together.rows(together.sample_id_B.argsort())
        mask_BT = rollouts.mask_BT.bool()
        _, value_mask_BT = masks(mask_BT, self._learner.rules.credit)
        ppo = self.config.ppo
        everyone = torch.arange(len(rollouts))
        size = ppo.micro_batch_size or ppo.mini_batch_size
        steps = [
            micro_batches(mini_B, rollouts, ppo.micro_batch_size or len(mini_B))
            for epoch in range(ppo.epochs)
            for mini_B in mini_batches(len(rollouts), self.config, iteration, epoch)
        ]
        return Calls(
            rollouts.tokens,
            [
                (*left_padded(list(request.prompt_ids)), torch.tensor(request.sample_ids))
                for request in requests
            ],
            made,
            [
                inputs_of(rollouts, mask_BT, mask_BT | value_mask_BT, rows, CPU)
                for rows in micro_batches(everyone, rollouts, size)
            ],
            [[inputs_of(rollouts, mask_BT, value_mask_BT, rows, CPU) for rows in step] for step in steps],
        )

    def seconds(self, calls: Calls) -> float:
        """All calls, one after the other."""
        engine, config = self._learner.engine, self.config
        started = time.perf_counter()
        for ids_BP, mask_BP, sample_ids_B in calls.prompts:
            generate(self._decoder, ids_BP, mask_BP, sample_ids_B, torch.arange(len(ids_BP)), self._sampling)
        for rollouts in calls.judged:
            self._reference_logp(rollouts)
        with torch.no_grad():
            for inputs in calls.credited:
                engine.forward(**inputs)
        for step in calls.learned:
            for inputs in step:
                outputs = engine.forward(**inputs)
                engine.backward(outputs["logp_BT"].sum() + outputs["values_BT"].sum())
            engine.step(rates_at(self._learner.groups, config.optimizer, self._steps, config.optimizer_steps))
            self._steps += 1
        return time.perf_counter() - started

    @property
    def _sampling(self) -> Sampling:
        rollout, seed = self.config.rollout, self.config.run.seed
        return Sampling(rollout.max_new_tokens, self._eos, self._eos, rollout.temperature, seed=seed)

    def _reference_logp(self, rollouts: Rollouts) -> None:
        real_BT = rollouts.mask_BT.bool()
        bf16 = self.config.reference.precision == "bf16"
        arithmetic: AbstractContextManager[object] = (
            torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        )
        with torch.inference_mode(), arithmetic:
            asked = (
                rollouts.prompt_ids_BP,
                rollouts.prompt_mask_BP,
                rollouts.response_ids_BT,
                rollouts.mask_BT,
            )
            states_BTD = response_states(self._reference, *asked)
            logits_NV = response_logits(self._reference, states_BTD[real_BT])
            token_logp(logits_NV[None], rollouts.response_ids_BT[real_BT][None])
