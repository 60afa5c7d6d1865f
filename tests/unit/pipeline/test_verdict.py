"""The verdict's bars, each with a run that reaches it and one that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fmray.config.rewards import CallableReward, RepetitionReward, RewardConfig
from fmray.config.rlhf import RlhfConfig
from fmray.errors import DataError
from fmray.pipeline.second_opinion import Answers, SecondOpinion
from fmray.pipeline.verdict import Finding, all_met, verdict

START = {"eval/score": 0.0, "eval/score_std": 0.5, "eval/kl": 0.01, "eval/distinct2": 0.9}
SECOND = "sentiment, second judge: words"
TEXTS = {"eval/length": 12.0, "eval/eos_rate": 0.5}


def reports(**end: float) -> list[dict[str, Any]]:
    last = {"eval/score": 0.6, "eval/score_std": 0.4, "eval/kl": 5.0, "eval/distinct2": 0.8}
    return [{"step": 0, **START, **TEXTS}, {"step": 1, "ppo/kl": 1.0}, {"step": 9, **last, **TEXTS, **end}]


def run(weight: float = 1.0) -> RlhfConfig:
    rewards: dict[str, RewardConfig] = {
        "sentiment": CallableReward(function="a:b", weight=weight),
        "watched": CallableReward(function="a:b", weight=0.0),
        "repetition": RepetitionReward(weight=0.5),
    }
    return RlhfConfig(rewards=rewards)


def answers(sentiment: float, repetition: float = 0.0) -> Answers:
    scores = {"sentiment": sentiment, "watched": -sentiment, "repetition": repetition}
    noise = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    raw = {name: value * (1 + noise) for name, value in scores.items()}
    return Answers(0, ("a", "b", "c"), ("x", "y", "z"), raw)


def opinion(after: float) -> SecondOpinion:
    return SecondOpinion("sentiment", "words", "counts", torch.zeros(3), torch.full((3,), after), 0.76)


def found(
    sentiment: float = 0.4, second: float = 0.2, weight: float = 1.0, **end: float
) -> dict[str, Finding]:
    findings = verdict(reports(**end), run(weight), answers(0.0), answers(sentiment, -0.3), [opinion(second)])
    return {finding.what: finding for finding in findings} | {
        "all": Finding("all", 0, 0, met=all_met(findings))
    }


def test_a_good_run_reaches_every_bar() -> None:
    findings = found()
    assert findings["all"].met
    assert findings["weighted reward"].after == pytest.approx(0.6 / 0.5)
    assert findings["sentiment"].change_text == "+0.4 ± 0.23"
    assert findings["repetition"].met is None  # a guard rail that gave way a little
    assert findings["watched"].met is None
    assert findings["answer length"].met is None
    assert "76%" in findings[SECOND].detail


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("weighted reward", {"eval/score": 0.49}),
        ("weighted reward", {"eval/score": float("nan")}),
        ("sentiment", {"sentiment": -0.01}),
        ("sentiment", {"weight": -1.0, "second": 0.1}),
        (SECOND, {"second": -0.1}),
        (SECOND, {"second": 0.0}),
        ("KL", {"eval/kl": 8.1}),
        ("distinct-2", {"eval/distinct2": 0.71}),
    ],
)
def test_each_bar_can_be_missed(what: str, options: dict[str, Any]) -> None:
    findings = found(**options)
    assert findings[what].met is False
    assert findings["all"].met is False


def test_a_run_that_was_not_evaluated_has_no_verdict() -> None:
    for lines in ([], reports()[:2], reports()[1:]):
        with pytest.raises(DataError, match="evaluate_prompts"):
            verdict(lines, run(), answers(0.0), answers(0.1), [])
