"""Rewards that are rules: length and repetition of the sampled token ids, and whether the answer is right."""

from __future__ import annotations

from collections.abc import Sequence

from fmray.config.rewards import AnswerReward, LengthReward, RepetitionReward
from fmray.evaluation.vqa_accuracy import anls, exact_match, vqa_accuracy
from fmray.rlhf.records import Rollouts
from fmray.rlhf.scoring import RewardRole, Verdict


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


class AnswerScorer(RewardRole):
    """How right the response is by its prompt's answers, 0..1 (`evaluation.vqa_accuracy`); without answers it has no score."""

    def __init__(self, config: AnswerReward) -> None:
        self._metric = config.metric

    def judge(self, rollouts: Rollouts) -> list[Verdict]:
        known = rollouts.answers if rollouts.answers is not None else ((),) * len(rollouts)
        return [self._verdict(said, answers) for said, answers in zip(rollouts.responses, known, strict=True)]

    def _verdict(self, said: str, answers: Sequence[str]) -> Verdict:
        if not answers:
            return "its prompt has no answers to compare with; prompts.source.kind=questions brings them"
        match self._metric:
            case "exact":
                return float(exact_match(said, answers))
            case "vqa_accuracy":
                return vqa_accuracy(said, answers)
            case "anls":
                return anls(said, answers)
