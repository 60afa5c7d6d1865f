"""What the roles of all rewards have in common: a number for each sample, or the reason why there is none."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Literal

import torch

from fmray.data.verdicts import joined
from fmray.rlhf.records import Rollouts, Scores

Verdict = float | str
"""A sample's raw score, or why it has none."""

SNIPPET = 120
"""Characters of a prompt or a response that an error shows."""


class RewardRole(ABC):
    """A reward in its pool. `judge` is a kind's own; `score` is what the pool is asked."""

    @abstractmethod
    def judge(self, rollouts: Rollouts) -> Sequence[Verdict]:
        """A verdict for each sample, in their order."""

    def score(self, rollouts: Rollouts) -> Scores:
        """Raw scores, float32 [B]; NaN, with a line about the sample, where there is no finite number."""
        verdicts = self.judge(rollouts)
        numbers = [math.nan if isinstance(verdict, str) else verdict for verdict in verdicts]
        raw_B = torch.tensor(numbers, dtype=torch.float64).float()
        failures = []
        for row in (~raw_B.isfinite()).nonzero().flatten().tolist():
            verdict = verdicts[row]
            why = verdict if isinstance(verdict, str) else f"its score is {verdict}, not a finite number"
            failures.append(f"{describe_sample(rollouts, row)}: {why}")
            raw_B[row] = math.nan
        return Scores(raw_B, tuple(failures))


def verdicts_of(scores: object, count: int) -> list[Verdict]:
    """What code that is not ours gave as the scores of `count` texts: a verdict for each, all failed where it is no such list."""
    if not isinstance(scores, list | tuple):
        return [f"the scores are {_said(scores)}, not a list of {count} numbers"] * count
    if len(scores) != count:
        return [f"there are {len(scores)} scores for {count} texts"] * count
    return [_verdict(score) for score in scores]


def _verdict(score: object) -> Verdict:
    if isinstance(score, bool) or not isinstance(score, Real):
        return f"its score is {_said(score)}, not a number"
    try:
        return float(score)
    except OverflowError:
        return f"its score is {_said(score)}, beyond all floats"


def _said(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= SNIPPET else f"{shown[:SNIPPET]}… ({type(value).__name__})"


def describe_sample(rollouts: Rollouts, row: int) -> str:
    """`sample 65 (prompt 'The film', response 'was good')`, in one line."""
    prompt, response = _snippet(rollouts.prompts[row]), _snippet(rollouts.responses[row])
    return f"sample {int(rollouts.sample_id_B[row])} (prompt {prompt!r}, response {response!r})"


def _snippet(text: str) -> str:
    return text if len(text) <= SNIPPET else f"{text[:SNIPPET]}…"


def texts_to_score(
    rollouts: Rollouts,
    what: Literal["response", "prompt_and_response"],
    special: re.Pattern[str] | None = None,
) -> list[str]:
    """The samples as text.

    special: special tokens of the scorer, taken out of the responses: a policy must not speak to its judge in them.
    """
    responses = [_without(response, special) for response in rollouts.responses]
    if what == "response":
        return responses
    return [joined(prompt, response) for prompt, response in zip(rollouts.prompts, responses, strict=True)]


def _without(text: str, special: re.Pattern[str] | None) -> str:
    if special is None:
        return text
    while (less := special.sub("", text)) != text:  # until none is left: taking one out may make another
        text = less
    return text
