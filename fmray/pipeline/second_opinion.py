"""What judges that the policy was not trained against say of its answers before and after: did it learn, or please its judge?

N answers to held-out prompts
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmray.config.demo import GRAMMAR, SENTIMENT, SecondOpinionConfig
from fmray.config.reward import ReviewVerdicts, RewardModelConfig
from fmray.config.rewards import RewardConfig
from fmray.data.reviews import Review, load_reviews, text_hash
from fmray.data.verdicts import spread
from fmray.errors import DataError
from fmray.evaluation.sentiment_judges import SentenceProbe, SentimentJudge, WordCounts, accuracy
from fmray.rlhf.records import Rollouts
from fmray.rlhf.scorers import build_scorer
from fmray.runtime.pool import Place
from fmray.runtime.run_folder import RunFolder
from fmray.runtime.weights import LocalWeightStore

# ------------------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True, slots=True)
class Answers:
    """One version's answers to the held-out prompts, as the run left them."""

    version: int
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    raw: dict[str, Tensor]
    """Each reward's raw scores, float64 [N], NaN where it failed."""


def read_answers(folder: RunFolder, version: int) -> Answers:
    """The answers in `held_out/version-…jsonl`. Raises DataError where there are none."""
    name = f"version-{version:08d}.jsonl"
    if not folder.exists("held_out", name):
        raise DataError(f"{folder.url}/held_out/{name}: no such file; did the run evaluate held-out prompts?")
    rows = [json.loads(line) for line in folder.read_text("held_out", name).splitlines()]
    rewards = [key for key in rows[0] if key not in ("prompt", "response", "picture", "answers")]
    return Answers(
        version,
        tuple(row["prompt"] for row in rows),
        tuple(row["response"] for row in rows),
        {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rewards},
    )


def all_answers(folder: RunFolder, reports: Sequence[Mapping[str, Any]]) -> tuple[Answers, ...]:
    """Of every version that the run evaluated, the first one first."""
    return tuple(read_answers(folder, line["step"]) for line in reports if "eval/score" in line)


# ----------------------------------------------------------------------------------------------------------- opinions


@dataclass(frozen=True, slots=True)
class SecondOpinion:
    """What one judge says of the same prompts' answers before and after."""

    beside: str
    """The reward that it stands beside."""
    what: str
    """The judge's name, for people."""
    detail: str
    """What it is."""
    before_N: Tensor
    after_N: Tensor
    held_out_accuracy: float | None = None
    """How often it is right about people's reviews, where that can be known."""

    @property
    def change(self) -> Change:
        return change(self.before_N, self.after_N)


@dataclass(frozen=True, slots=True)
class Change:
    """Means before and after, and the standard error of their difference over prompts. `Change(0.1, 0.5, 0.07)`"""

    before: float
    after: float
    error: float

    @property
    def difference(self) -> float:
        return self.after - self.before


def change(before_N: Tensor, after_N: Tensor) -> Change:
    """Of paired scores; a prompt that either lacks (NaN) is left out."""
    known_N = ~(before_N.isnan() | after_N.isnan())
    before_N, after_N = before_N[known_N].double(), after_N[known_N].double()
    count = len(before_N)
    spread_of_difference = float((after_N - before_N).std()) if count > 1 else math.nan
    return Change(float(before_N.mean()), float(after_N.mean()), spread_of_difference / math.sqrt(count or 1))


def second_opinions(
    config: SecondOpinionConfig,
    trained: RewardModelConfig,
    before: Answers,
    after: Answers,
    device: torch.device,
) -> list[SecondOpinion]:
    """Every judge's. Raises DataError where the answers are to different prompts, AssetError, ConfigError."""
    if before.prompts != after.prompts:
        raise DataError(
            f"versions {before.version} and {after.version} answered different held-out prompts: start the run afresh"
        )
    return [
        *sentiment_opinions(config, trained, before, after, device),
        grammar_opinion(config.grammar, before, after, device),
    ]


def sentiment_opinions(
    config: SecondOpinionConfig,
    trained: RewardModelConfig,
    before: Answers,
    after: Answers,
    device: torch.device,
) -> Iterator[SecondOpinion]:
    """Of a probe of a frozen encoder, and of counted words; each with its accuracy on held-out Rotten Tomatoes."""
    test = load_reviews("test", "rotten_tomatoes")
    for judge in sentiment_judges(config, trained, device):
        right = accuracy(judge, [review.text for review in test], [review.label for review in test])
        answers = (judge.log_odds(before.responses), judge.log_odds(after.responses))
        yield SecondOpinion(SENTIMENT, judge.name, judge.detail, *answers, right)


def sentiment_judges(
    config: SecondOpinionConfig, trained: RewardModelConfig, device: torch.device
) -> Iterator[SentimentJudge]:
    """The probe learns from short texts, as the answers are; the counts are of whole reviews that the reward model never saw."""
    unseen = unseen_imdb(trained)
    count = config.probe_reviews
    short = [review.text for review in shuffled(load_reviews("train", "rotten_tomatoes"))[:count]]
    labels = [review.label for review in shuffled(load_reviews("train", "rotten_tomatoes"))[:count]]
    short += [last_words(review) for review in unseen[:count]]
    labels += [review.label for review in unseen[:count]]
    yield SentenceProbe.of(config.encoder, device, short, labels)
    counted = unseen[: config.counted_reviews]
    yield WordCounts.of([review.text for review in counted], [review.label for review in counted])


def unseen_imdb(trained: RewardModelConfig) -> list[Review]:
    """IMDB's training reviews but for those that the reward model has learned from, in an order that mixes the labels."""
    everything, source = load_reviews("train", "imdb"), trained.data.source
    seen = spread(everything, source.imdb) if isinstance(source, ReviewVerdicts) else ()
    known = {review.text for review in seen}
    return shuffled([review for review in everything if review.text not in known])


def shuffled(reviews: Sequence[Review]) -> list[Review]:
    """In the order of their texts' hashes: the same everywhere."""
    return sorted(reviews, key=lambda review: text_hash(review.text))


def last_words(review: Review) -> str:
    """Its last 10 to 30 words, about as many as an answer has."""
    return " ".join(review.text.split()[-(10 + text_hash(review.text) % 21) :])


def grammar_opinion(
    config: RewardConfig, before: Answers, after: Answers, device: torch.device
) -> SecondOpinion:
    """Of any reward, as a pool would ask it."""
    scorer = build_scorer(config, Place(device, LocalWeightStore(1)))
    scores = [scorer.score(as_rollouts(answers)).raw_B.double() for answers in (before, after)]
    source = str(getattr(config, "source", "")).removeprefix("asset:")
    detail = f"{config.kind} {source}".strip()
    return SecondOpinion(GRAMMAR, config.kind, detail, scores[0], scores[1])


def as_rollouts(answers: Answers) -> Rollouts:
    """Texts alone, for judges that read nothing else."""
    rows = len(answers.prompts)
    nothing = torch.zeros(rows, 0)
    number_B = torch.arange(rows)
    return Rollouts(
        sample_id_B=number_B,
        prompt_B=number_B,
        version_B=torch.full((rows,), answers.version),
        prompt_ids_BP=nothing.long(),
        prompt_mask_BP=nothing.long(),
        response_ids_BT=nothing.long(),
        mask_BT=nothing,
        rollout_logp_BT=nothing,
        ended_B=torch.zeros(rows, dtype=torch.bool),
        prompts=answers.prompts,
        responses=answers.responses,
    )
