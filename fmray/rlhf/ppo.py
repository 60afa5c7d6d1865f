"""Credit and learn: from judged samples to token advantages, and from these to optimizer steps.

Every rank has the whole batch's numbers, so means and whitening need no communication; forwards and backwards are shared out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fmray.config.rlhf import RlhfConfig
from fmray.errors import PoolError
from fmray.models.language import adapter_off
from fmray.rlhf.credit import Credit, credit, masks
from fmray.rlhf.experience import Judged
from fmray.rlhf.kl import kl_estimate
from fmray.rlhf.learner import PpoLearner
from fmray.rlhf.losses import (
    explained_variance,
    importance_weights,
    mismatch_sums,
    policy_loss,
    policy_metrics,
    token_denominator,
    token_mean,
    total_loss,
    value_loss,
)
from fmray.rlhf.records import Rollouts, pad_right
from fmray.rlhf.rewards import Judgement
from fmray.rlhf.sums import Sums
from fmray.runtime.context import Context
from fmray.training.engine import rates_at
from fmray.types import Metrics


@dataclass(frozen=True, slots=True)
class PpoBatch:
    """An iteration's samples with what each token is worth, on every rank alike."""

    rollouts: Rollouts
    old_logp_BT: Tensor
    reference_logp_BT: Tensor
    values_BT: Tensor | None
    credit: Credit
    importance_BT: Tensor | None


# ------------------------------------------------------------------------------------------------------------------ credit


def give_credit(
    judged: Judged, judgement: Judgement, learner: PpoLearner, version: int, context: Context
) -> tuple[PpoBatch, Metrics]:
    """Values, log-probabilities under the present weights, penalties, advantages. A collective."""
    rules, config = learner.rules, learner.config
    rollouts = judged.rollouts
    if rules.credit.value_mask == "plus_one":  # the critic is asked one place behind an answer
        width = rollouts.prompt_ids_BP.shape[1]
        rollouts = rollouts.padded_to(width, config.rollout.max_new_tokens)
    length = rollouts.response_ids_BT.shape[1]
    mask_BT = rollouts.mask_BT.bool() & judgement.scored_B[:, None]
    policy_mask_BT, value_mask_BT = masks(mask_BT, rules.credit)
    said = on_all_rows(learner, rollouts, mask_BT, mask_BT | value_mask_BT, context)
    if judged.reference_logp_BT is None:
        with adapter_off(learner.model.policy):
            reference = on_all_rows(learner, rollouts, mask_BT, mask_BT, context)["logp_BT"]
    else:
        reference = pad_right(judged.reference_logp_BT, length)
    old_logp_BT = said["logp_BT"] if rules.loss.old_logp == "learner" else rollouts.rollout_logp_BT
    values_BT = said.get("values_BT")
    worth = credit(
        judgement.scores_B.nan_to_num(),
        rollouts.ended_B,
        old_logp_BT,
        reference,
        values_BT,
        mask_BT,
        rollouts.prompt_B,
        rules.credit,
        learner.kl.coefficient,
    )
    check_arrived(said["logp_BT"], rollouts, mask_BT, version, config)
    mismatch = mismatch_sums(
        said["logp_BT"], rollouts.rollout_logp_BT, policy_mask_BT, rules.loss.importance_cap
    )
    importance = None
    if rules.loss.importance_cap is not None:
        importance = importance_weights(old_logp_BT, rollouts.rollout_logp_BT, rules.loss.importance_cap)
    batch = PpoBatch(rollouts, old_logp_BT, reference, values_BT, worth, importance)
    metrics = {f"ppo/{name}": value for name, value in (worth.sums().means() | mismatch.means()).items()}
    metrics |= {
        "ppo/entropy": token_mean(said["entropy_BT"], policy_mask_BT).item(),
        "ppo/eos_rate": rollouts.ended_B.float().mean().item(),
        "ppo/staleness": (version - rollouts.version_B).float().mean().item(),
        "ppo/kl_coefficient": learner.kl.coefficient,
    }
    if values_BT is not None and worth.returns_BT is not None:
        explained = explained_variance(values_BT, worth.returns_BT, worth.value_mask_BT)
        metrics["ppo/explained_variance"] = explained.nan_to_num().item()
    return batch, metrics


def check_arrived(
    logp_BT: Tensor, rollouts: Rollouts, mask_BT: Tensor, version: int, config: RlhfConfig
) -> None:
    """Refuse to learn where the rollout policy is not the learner: weights that did not arrive, or too little precision."""
    limit = config.rollout.logp_limit
    fresh_BT = mask_BT & (rollouts.version_B == version)[:, None]
    if limit is None or not bool(fresh_BT.any()):
        return
    difference = token_mean((logp_BT - rollouts.rollout_logp_BT).abs(), fresh_BT).item()
    if not difference <= limit:
        raise PoolError(
            f"pool 'rollout', phase credit: samples of weights {version} have log-probabilities {difference:.4f} nats from the "
            f"learner's own on average, more than rollout.logp_limit={limit}: the rollout policy is not the learner's; "
            "raise rollout.precision, or the limit if the difference is known"
        )


def on_all_rows(
    learner: PpoLearner, rollouts: Rollouts, mask_BT: Tensor, value_mask_BT: Tensor, context: Context
) -> dict[str, Tensor]:
    """The learner's outputs for the whole batch, on the CPU: each rank forwards its share, all get everything."""
    mine = torch.arange(context.rank, len(rollouts), context.world_size)
    parts: dict[str, Tensor] = {}
    size = learner.config.ppo.micro_batch_size or learner.config.ppo.mini_batch_size // context.world_size
    with torch.no_grad():
        for rows in micro_batches(mine, rollouts, size):
            outputs = learner.engine.forward(
                **inputs_of(rollouts, mask_BT, value_mask_BT, rows, context.device)
            )
            for name, values in outputs.items():
                whole = parts.setdefault(name, torch.zeros(mask_BT.shape))
                whole[rows] = pad_right(values.float().cpu(), mask_BT.shape[1])
    # every row is some rank's, and zero on the others
    return {name: context.sum(part.to(context.device)).cpu() for name, part in parts.items()}


def micro_batches(rows: Tensor, rollouts: Rollouts, size: int) -> list[Tensor]:
    """The rows in groups of a size, alike in length: less padding, the same result."""
    length_B = rollouts.prompt_mask_BP.sum(1) + rollouts.mask_BT.sum(1)
    by_length = rows[length_B[rows].argsort(stable=True)]
    return list(torch.split(by_length, size))


def inputs_of(
    rollouts: Rollouts, mask_BT: Tensor, value_mask_BT: Tensor, rows: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """Arguments of the actor-critic for some rows, without the columns that none of them needs."""
    prompt = int(rollouts.prompt_mask_BP[rows].sum(1).amax())
    response = max(1, int((mask_BT | value_mask_BT)[rows].sum(1).amax()))
    tensors = {
        "prompt_ids_BP": rollouts.prompt_ids_BP[rows, -prompt:],
        "prompt_mask_BP": rollouts.prompt_mask_BP[rows, -prompt:],
        "response_ids_BT": rollouts.response_ids_BT[rows, :response],
        "mask_BT": mask_BT[rows, :response],
        "value_mask_BT": value_mask_BT[rows, :response],
    }
    if rollouts.pixels_BCHW is not None:
        tensors["pixels_BCHW"] = rollouts.pixels_BCHW[rows]
    return {name: tensor.to(device) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------------------------- learn


def learn(batch: PpoBatch, learner: PpoLearner, iteration: int, context: Context) -> Metrics:
    """All epochs over the batch; a mini-batch is one optimizer step, whatever its split into micro-batches and ranks."""
    config, ppo = learner.config, learner.config.ppo
    measured: list[tuple[Sums, Sums | None]] = []
    norms = []
    for epoch in range(learner.rules.loss.epochs):
        for mini_B in mini_batches(len(batch.rollouts), config, iteration, epoch):
            mine = mini_B[context.rank :: context.world_size]
            parts = micro_batches(mine, batch.rollouts, ppo.micro_batch_size or len(mine))
            for number, rows in enumerate(parts):
                loss, sums = loss_of(batch, learner, mini_B, rows, len(parts), iteration, context)
                learner.engine.backward(loss, last=number == len(parts) - 1)
                measured.append(sums)
            rates = rates_at(
                learner.groups, config.optimizer, learner.optimizer_steps, config.optimizer_steps
            )
            norms.append(learner.engine.step(rates))
            learner.optimizer_steps += 1
    metrics = metrics_of(measured, context)
    metrics |= {"train/gradient_norm": sum(norms) / len(norms), "train/learning_rate": max(rates)}
    # Ziegler's controller: the whole answer's KL, the samples it was measured on
    kl = batch.credit.sums().means()["kl"]
    learner.kl = learner.kl.updated(kl, len(batch.rollouts))
    return metrics


def mini_batches(samples: int, config: RlhfConfig, iteration: int, epoch: int) -> Iterator[Tensor]:
    """The samples in a new order, cut: a function of (seed, iteration, epoch), the same on every rank."""
    generator = torch.Generator().manual_seed(
        (config.run.seed * 1_000_003 + iteration) * 1_009 + epoch & (2**62 - 1)
    )
    order_B = torch.randperm(samples, generator=generator)
    yield from torch.split(order_B, config.ppo.mini_batch_size)


def loss_of(
    batch: PpoBatch,
    learner: PpoLearner,
    mini_B: Tensor,
    rows: Tensor,
    parts: int,
    iteration: int,
    context: Context,
) -> tuple[Tensor, tuple[Sums, Sums | None]]:
    """One micro-batch's share of its mini-batch's loss, with gradient, and the sums of its metrics."""
    rules, ppo, worth = learner.rules.loss, learner.config.ppo, batch.credit
    policy_mask_BT, value_mask_BT = worth.policy_mask_BT, worth.value_mask_BT
    given = inputs_of(batch.rollouts, batch.rollouts.mask_BT.bool(), value_mask_BT, rows, context.device)
    outputs = learner.engine.forward(**given)
    length = given["mask_BT"].shape[1]

    def of_rows(values_BT: Tensor) -> Tensor:
        return values_BT[rows, :length].to(context.device)

    def denominator(mask_BT: Tensor) -> Tensor | None:
        if rules.token_mean == "micro_batch":
            return None
        # every rank knows the whole mini-batch; engines average the ranks' gradients
        return token_denominator(mask_BT[mini_B], ranks=context.world_size)

    mask_BT, tokens = of_rows(policy_mask_BT), denominator(policy_mask_BT)
    importance_BT = None if batch.importance_BT is None else of_rows(batch.importance_BT)
    acted = policy_loss(
        outputs["logp_BT"],
        of_rows(batch.old_logp_BT),
        of_rows(worth.advantages_BT),
        mask_BT,
        rules.clip,
        tokens,
        importance_BT,
    )
    valued = None
    if batch.values_BT is not None and worth.returns_BT is not None:
        valued = value_loss(
            outputs["values_BT"],
            of_rows(batch.values_BT),
            of_rows(worth.returns_BT),
            of_rows(value_mask_BT),
            rules.value_clip,
            denominator(value_mask_BT),
        )
    if valued is not None and iteration < ppo.critic_warmup:
        return rules.value_coefficient * valued.loss, (acted.sums, valued.sums)
    loss = total_loss(acted, valued, rules)
    if ppo.kl.place == "loss":
        kl_BT = kl_estimate(outputs["logp_BT"], of_rows(batch.reference_logp_BT), ppo.kl.estimator)
        loss = loss + learner.kl.coefficient * token_mean(kl_BT, mask_BT, tokens)
    if rules.entropy_coefficient:
        loss = loss - rules.entropy_coefficient * token_mean(outputs["entropy_BT"], mask_BT, tokens)
    if rules.token_mean == "micro_batch":
        loss = loss / parts  # as accelerate does where it accumulates
    return loss, (acted.sums, valued.sums if valued is not None else None)


def metrics_of(measured: list[tuple[Sums, Sums | None]], context: Context) -> Metrics:
    """Token means over all epochs, micro-batches and ranks; a collective."""

    def everyones(sums: list[Sums]) -> Sums:
        total = sums[0]
        for more in sums[1:]:
            total = total + more
        return total.over_ranks(lambda tensor: context.sum(tensor.to(context.device)).cpu())

    metrics = {
        f"ppo/{name}": value
        for name, value in policy_metrics(everyones([acted for acted, _ in measured])).items()
    }
    valued = [sums for _, sums in measured if sums is not None]
    if valued:
        metrics |= {f"ppo/{name}": value for name, value in everyones(valued).means().items()}
    return metrics
