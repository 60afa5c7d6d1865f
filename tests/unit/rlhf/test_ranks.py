"""Real gloo ranks against one process with the whole batch: credit, losses, gradients and metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fmray.rlhf.credit import CreditRules, credit
from fmray.rlhf.losses import (
    LossRules,
    explained_variance,
    policy_loss,
    policy_metrics,
    token_denominator,
    total_loss,
    value_loss,
)
from fmray.rlhf.sums import one_rank
from tests.unit.rlhf.batches import drawn_batch
from tests.workers import run_workers

ROWS, LENGTH, MICRO = 12, 9, 2
RULES = (
    CreditRules(),
    CreditRules(whiten_rewards=True, unbiased=False),
    CreditRules(advantage="reinforce++"),
    CreditRules(advantage="rloo", whiten_advantages=True),
)


def all_reduce(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def learn(rank: int, world: int) -> list[dict[str, Any]]:
    """One mini-batch in micro-batches on this rank's rows: credit, gradients averaged over ranks, metrics of all."""
    everyone = all_reduce if world > 1 else one_rank
    whole = drawn_batch(ROWS, LENGTH, 11)
    drift = torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    batch, moved = whole.rows(mine), 0.4 * drift[mine]
    found = []
    for rules in RULES:
        arguments = list(batch.arguments())
        if rules.advantage != "gae":
            arguments[4] = None  # type: ignore[call-overload]
        given = credit(*arguments, rules, 0.1, everyone)  # type: ignore[arg-type]
        # one weight each for policy and critic, so that gradients are comparable over any number of ranks
        weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
        denominator = token_denominator(given.policy_mask_BT, everyone, world)
        returns = given.advantages_BT if given.returns_BT is None else given.returns_BT
        sums = []
        for start in range(0, len(batch.scores_B), MICRO):
            rows = slice(start, start + MICRO)
            policy = policy_loss(
                batch.old_logp_BT[rows] + weights[0] * moved[rows],
                batch.old_logp_BT[rows],
                given.advantages_BT[rows],
                given.policy_mask_BT[rows],
                0.2,
                denominator,
            )
            value = value_loss(
                weights[1] * batch.values_BT[rows] + moved[rows],
                batch.values_BT[rows],
                returns[rows],
                given.value_mask_BT[rows],
                0.2,
                denominator,
            )
            total_loss(policy, value, LossRules()).backward()
            sums.append(policy.sums)
        assert weights.grad is not None
        metrics = policy_metrics(sum(sums[1:], start=sums[0]).over_ranks(everyone))
        metrics |= given.sums().over_ranks(everyone).means()
        explained = explained_variance(batch.values_BT, returns, given.value_mask_BT, everyone)
        metrics["explained_variance"] = explained.item()
        average = everyone(weights.grad) / world
        found.append({"metrics": metrics, "gradient": average, "advantages": given.advantages_BT})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_6_14_6_17_ranks_credit_and_learn_as_one_process_with_the_whole_batch(world: int) -> None:
    whole, ranks = learn(0, 1), run_workers(world, learn)
    for case, expected in enumerate(whole):
        advantages = torch.cat([rank[case]["advantages"] for rank in ranks])
        assert torch.allclose(advantages, expected["advantages"], atol=1e-10), RULES[case]
        for rank in ranks:
            assert rank[case]["metrics"] == pytest.approx(expected["metrics"], abs=1e-10), RULES[case]
            assert torch.allclose(rank[case]["gradient"], expected["gradient"], atol=1e-10), RULES[case]


def test_6_14_the_ranks_shares_whitened_alone_are_not_the_batch_whitened() -> None:
    """What `whiten_scope="rank"` is, and what the test above would see."""
    batch = drawn_batch(ROWS, LENGTH, 11)
    rules = CreditRules(whiten_scope="rank")
    whole = credit(*batch.arguments(), rules, 0.1).advantages_BT
    halves = [
        credit(*batch.rows(rows).arguments(), rules, 0.1).advantages_BT
        for rows in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))
    ]
    assert not torch.allclose(torch.cat(halves), whole, atol=1e-2)
