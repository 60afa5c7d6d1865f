"""Several rewards, one score: each brought to a mean of 0 and a deviation of 1, clipped, weighted, summed.

B samples  R rewards
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fmray.config.rewards import RewardConfig
from fmray.errors import CheckpointError, RewardError
from fmray.rlhf.records import Rollouts
from fmray.rlhf.scoring import describe_sample
from fmray.rlhf.sums import SumOverRanks, one_rank
from fmray.types import Metrics

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the rewards say together."""

    scores_B: Tensor
    """float32 [B], Σ weight · normalised; NaN where the sample was not scored, so that nobody learns from it by mistake."""
    scored_B: Tensor
    """bool [B], False where a reward with a weight has no number: such a sample is left out of the learning."""
    normalized: dict[str, Tensor]
    """Each reward's float32 [B] as it enters the sum, clipped; NaN where it has no number."""
    metrics: Metrics
    """`reward/<name>/raw`, `/raw_std`, `/normalized` and `reward/score`, `/score_std` of this batch's samples that have them, on
    all ranks, absent where none has; `reward/<name>/failed` of the whole run."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Number, mean and sum of squared deviations of all raw scores so far. `Moments(3, 2.0, 2.0)` is that of 1, 2, 3."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def with_batch(self, other: Moments) -> Moments:
        """Of both (Chan, Golub, LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * other.count / count,
            self.m2 + other.m2 + delta * delta * self.count * other.count / count,
        )

    @property
    def deviation(self) -> float:
        """With Bessel's correction; 0 for fewer than two scores."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0

    @property
    def scale(self) -> float:
        """What to divide by: the deviation, unless it is within the float32 rounding of the mean, which is no signal."""
        return max(self.deviation, 1e-6 * abs(self.mean)) or 1.0


class RewardBank:
    """Normalisers, weights and failure budgets of a run's rewards, the same on every rank.

    Normalisation is by all raw scores of the run, this batch's included: the first batch normalises itself, and a reward's
    scale settles as scores come in (like trl 0.11's `RunningMoments`, its deviation too).
    """

    def __init__(self, rewards: Mapping[str, RewardConfig]) -> None:
        self._rewards = dict(rewards)
        self._moments = dict.fromkeys(self._rewards, Moments())
        self._failed = dict.fromkeys(self._rewards, 0)

    def combine(
        self,
        raw: Mapping[str, Tensor],
        rollouts: Rollouts,
        failures: Mapping[str, Sequence[str]],
        sum_over_ranks: SumOverRanks = one_rank,
    ) -> Judgement:
        """Take a batch into the running moments, then judge it by them.

        raw: each reward's raw scores, float32 [B], in the order of `rollouts`; what is no finite number counts as failed.
        failures: the scorers' lines about failed samples, as far as this rank knows them.
        sum_over_ranks: where each rank has samples of its own; left out where every rank has the whole batch. Any split of
        the samples among ranks gives the same scores up to rounding in float64.
        Raises RewardError, on all ranks together, where more samples failed than a reward's budget allows.
        """
        self.count_failures(raw, rollouts, failures, sum_over_ranks)
        names = list(self._rewards)
        raw_RB = torch.stack([raw[name] for name in names]).double()
        valid_RB = raw_RB.isfinite()
        batch = batch_moments(raw_RB, valid_RB, sum_over_ranks)
        for name, found in zip(names, batch, strict=True):
            self._moments[name] = self._moments[name].with_batch(found)
        normalized_RB = self._normalize(raw_RB).masked_fill(~valid_RB, math.nan)

        weight_R = raw_RB.new_tensor([reward.weight for reward in self._rewards.values()])
        counts_R = weight_R != 0
        scored_B = valid_RB[counts_R].all(0)
        scores_B = (weight_R[counts_R, None] * normalized_RB[counts_R]).sum(0)

        everything_NB = torch.cat([normalized_RB, scores_B[None]])
        told_NB = torch.cat([valid_RB, scored_B[None]])
        *each, score = batch_moments(everything_NB, told_NB, sum_over_ranks)
        metrics: Metrics = {}
        if score.count:
            metrics |= {"reward/score": score.mean, "reward/score_std": score.deviation}
        for name, of_raw, of_normalized in zip(names, batch, each, strict=True):
            metrics[f"reward/{name}/failed"] = float(self._failed[name])
            if of_raw.count:
                metrics |= {
                    f"reward/{name}/raw": of_raw.mean,
                    f"reward/{name}/raw_std": of_raw.deviation,
                    f"reward/{name}/normalized": of_normalized.mean,
                }
        normalized = dict(zip(names, normalized_RB.float(), strict=True))
        return Judgement(scores_B.float(), scored_B, normalized, metrics)

    def _normalize(self, raw_RB: Tensor) -> Tensor:
        """Minus the mean, over the deviation, clipped: each row by its reward's keys and moments."""
        rewards = [(self._rewards[name], moments) for name, moments in self._moments.items()]
        running = [
            (moments.mean, moments.scale) if r.normalize == "running" else (0, 1) for r, moments in rewards
        ]
        mean_R1, scale_R1 = raw_RB.new_tensor(running).T.unsqueeze(-1)
        limit_R1 = raw_RB.new_tensor([math.inf if r.clip is None else r.clip for r, _ in rewards])[:, None]
        normalized_RB: Tensor = ((raw_RB - mean_R1) / scale_R1).clamp(-limit_R1, limit_R1)
        return normalized_RB

    # -------------------------------------------------------------------------------------------------------- failures

    def count_failures(
        self,
        raw: Mapping[str, Tensor],
        rollouts: Rollouts,
        failures: Mapping[str, Sequence[str]],
        sum_over_ranks: SumOverRanks = one_rank,
    ) -> None:
        """Charge the samples without a number to the rewards' budgets. Raises RewardError on all ranks together."""
        failed_R = sum_over_ranks(torch.stack([(~raw[name].isfinite()).sum() for name in self._rewards]))
        for (name, reward), count in zip(self._rewards.items(), failed_R.tolist(), strict=True):
            if not count:
                continue
            for line in failures.get(name, ()):
                _log.warning("reward '%s': %s", name, line)
            self._failed[name] += int(count)
            if self._failed[name] > reward.failure_budget:
                raise RewardError(
                    f"reward '{name}': {self._failed[name]} samples of this run could not be scored, "
                    f"rewards.{name}.failure_budget={reward.failure_budget} allows no more; "
                    f"{_first_failure(raw[name], rollouts, failures.get(name, ()))}"
                )

    # ---------------------------------------------------------------------------------------------------------- resume

    def state(self) -> dict[str, dict[str, float]]:
        """Plain JSON, for `load` of a bank with the same rewards."""
        return {name: asdict(m) | {"failed": self._failed[name]} for name, m in self._moments.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; weights, clips and budgets are the configuration's, not the state's.

        Raises CheckpointError where it is of other rewards, or none of a bank's.
        """
        if state.keys() != self._rewards.keys():
            raise CheckpointError(
                f"the checkpoint's rewards are {', '.join(sorted(state))}, the configuration's are "
                f"{', '.join(sorted(self._rewards))}: keep their names to resume (weight 0 switches one off), or start "
                "another run"
            )
        try:
            self._moments = {
                name: Moments(*(float(state[name][key]) for key in ("count", "mean", "m2")))
                for name in self._rewards
            }
            self._failed = {name: int(state[name]["failed"]) for name in self._rewards}
        except (KeyError, TypeError, ValueError):
            raise CheckpointError("the checkpoint's running moments of the rewards are damaged") from None


def batch_moments(values_RB: Tensor, valid_RB: Tensor, sum_over_ranks: SumOverRanks) -> list[Moments]:
    """Of each row's valid values over all ranks; in two passes, so that a large mean costs no digits.

    values_RB: float64; what is not valid may be anything.
    """
    sums_2R = torch.stack([valid_RB.sum(1).double(), values_RB.masked_fill(~valid_RB, 0).sum(1)])
    count_R, total_R = sum_over_ranks(sums_2R)
    mean_R = total_R / count_R.clamp(min=1)
    squares_RB = (values_RB - mean_R[:, None]).square()
    m2_R = sum_over_ranks(squares_RB.masked_fill(~valid_RB, 0).sum(1))
    return [Moments(*of) for of in torch.stack([count_R, mean_R, m2_R], dim=1).tolist()]


def _first_failure(raw_B: Tensor, rollouts: Rollouts, lines: Sequence[str]) -> str:
    """About the first failed sample that this rank knows of: its scorer's line, or who it is."""
    if lines:
        return lines[0]
    rows = (~raw_B.isfinite()).nonzero().flatten().tolist()
    where = "why is in the log of the rank that asked for it"
    return f"{describe_sample(rollouts, rows[0])}: {where}" if rows else f"another rank's sample; {where}"
