"""Rewards that are rules over the sampled token ids: length and repetition."""

from __future__ import annotations

from fmray.config.rewards import LengthReward, RepetitionReward
from fmray.rlhf.records import Rollouts
from fmray.rlhf.scoring import RewardRole


def said_ids(rollouts: Rollouts) -> list[list[int]]:
    """Each response's token ids, without padding and without the EOS that ended it."""
    lengths = (rollouts.mask_BT.sum(1).long() - rollouts.ended_B.long()).tolist()
    rows = rollouts.response_ids_BT.tolist()
    return [ids[:length] for ids, length in zip(rows, lengths, strict=True)]


class LengthScorer(RewardRole):
    """0 for a response of `min_tokens` to `max_tokens`, else minus the tokens that it lacks or has too many, over `scale`."""

    def __init__(self, config: LengthReward) -> None:
        self._config = config

    def judge(self, rollouts: Rollouts) -> list[float]:
        low, high, scale = self._config.min_tokens, self._config.max_tokens, self._config.scale
        lengths = [len(ids) for ids in said_ids(rollouts)]
        return [min(length - low, high - length, 0) / scale for length in lengths]


class RepetitionScorer(RewardRole):
    """Minus the share of n-grams that stood in the response before, in (-1, 0]; 0 where it is shorter than n."""

    def __init__(self, config: RepetitionReward) -> None:
        self._n = config.n

    def judge(self, rollouts: Rollouts) -> list[float]:
        return [distinct(ids, self._n) - 1 for ids in said_ids(rollouts)]


def distinct(ids: list[int], n: int) -> float:
    """Different n-grams over all n-grams (distinct-n, Li et al. 2016), in (0, 1]; 1 where there is no n-gram."""
    grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0
