"""The verdict on a PPO run: every measure before and after, on the same held-out prompts, and the bar that it had to reach."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fmray.config.rewards import LengthReward, RepetitionReward
from fmray.config.rlhf import RlhfConfig
from fmray.errors import DataError
from fmray.pipeline.charts import number
from fmray.pipeline.second_opinion import Answers, Change, SecondOpinion, change

GAIN = 1.0
"""Deviations of the starting policy's weighted reward that must be won."""
MOST_KL = 8.0
"""Nats of a whole answer's KL to the reference policy."""
LEAST_DISTINCT = 0.8
"""Share of the start's distinct-2 that must be left."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One measure. `Finding("sentiment", 0.1, 0.8, 0.06, "not below its start", True)`"""

    what: str
    before: float
    after: float
    error: float | None = None
    """Standard error of the change over prompts, where every answer has a number."""
    bar: str = ""
    met: bool | None = None
    """None: no bar."""
    detail: str = ""
    """More about the measure."""

    @property
    def change_text(self) -> str:
        """`+0.7 ± 0.06`"""
        known = self.error is not None and not math.isnan(self.error)
        return f"{self.after - self.before:+.3g}" + (f" ± {self.error:.2g}" if known else "")

    @property
    def met_text(self) -> str:
        return {True: "✓", False: "✗ missed", None: ""}[self.met]


def first_and_last(reports: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The held-out evaluations of the starting and of the final policy; raises DataError where there are not two."""
    evaluated = [line for line in reports if "eval/score" in line]
    if len(evaluated) < 2 or evaluated[0]["step"] != 0:
        raise DataError(
            "the run has no held-out evaluation before its first and after its last iteration (train.evaluate_prompts)"
        )
    return evaluated[0], evaluated[-1]


def verdict(
    reports: Sequence[Mapping[str, Any]],
    config: RlhfConfig,
    before: Answers,
    after: Answers,
    opinions: Sequence[SecondOpinion],
) -> tuple[Finding, ...]:
    """Every measure of a run on its held-out prompts. Raises DataError where the run did not evaluate them twice."""
    start, end = first_and_last(reports)
    changes = {name: change(before.raw[name], after.raw[name]) for name in config.rewards}
    return (
        weighted(start, end),
        *(of_reward(name, found, config) for name, found in changes.items()),
        *(of_opinion(opinion, changes[opinion.beside]) for opinion in opinions),
        *of_texts(start, end),
    )


def weighted(start: Mapping[str, Any], end: Mapping[str, Any]) -> Finding:
    """Σ weight · standardised reward, in units of its own deviation over the starting policy's answers."""
    unit = start["eval/score_std"] or math.nan
    won = (end["eval/score"] - start["eval/score"]) / unit
    detail = "of the starting policy's, in units of its deviation over the prompts"
    return Finding("weighted reward", 0.0, won, None, f"at least +{GAIN:g}", won >= GAIN, detail)


def of_reward(name: str, found: Change, config: RlhfConfig) -> Finding:
    """A reward's raw mean. Rules (length, repetition) are guard rails: measured, without a bar; so is weight 0."""
    reward = config.rewards[name]
    guards = isinstance(reward, LengthReward | RepetitionReward) or reward.weight == 0
    detail = f"{reward.kind}, weight {reward.weight:g}"
    values = (name, found.before, found.after, found.error)
    if guards:
        return Finding(*values, detail=detail)
    aim = "not below its start" if reward.weight > 0 else "not above its start"
    return Finding(*values, aim, found.difference * math.copysign(1, reward.weight) >= 0, detail)


def of_opinion(opinion: SecondOpinion, first: Change) -> Finding:
    """A second judge agrees where its mean moved in the direction in which the reward's did."""
    found, right = opinion.change, opinion.held_out_accuracy
    return Finding(
        f"{opinion.beside}, second judge: {opinion.what}",
        found.before,
        found.after,
        found.error,
        f"{opinion.beside}'s sign",
        found.difference * first.difference > 0,
        opinion.detail if right is None else f"{opinion.detail}; right about {right:.0%} of held-out reviews",
    )


def of_texts(start: Mapping[str, Any], end: Mapping[str, Any]) -> Iterator[Finding]:
    """How far the policy went, and whether it still has something to say."""

    def finding(what: str, key: str, detail: str, bar: str = "", met: bool | None = None) -> Finding:
        return Finding(what, start[key], end[key], None, bar, met, detail)

    near = end["eval/kl"] <= MOST_KL
    yield finding("KL", "eval/kl", "to the reference policy, nats an answer", f"at most {MOST_KL:g}", near)
    left = end["eval/distinct2"] >= LEAST_DISTINCT * start["eval/distinct2"]
    many = f"at least {number(LEAST_DISTINCT)} of the start's"
    yield finding("distinct-2", "eval/distinct2", "different pairs of words over all", many, left)
    yield finding("answer length", "eval/length", "tokens")
    yield finding("EOS share", "eval/eos_rate", "answers that ended by themselves")


def all_met(findings: Sequence[Finding]) -> bool:
    """Whether every bar was reached."""
    return all(finding.met is not False for finding in findings)
