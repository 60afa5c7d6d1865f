"""Rules over token ids and answers, and what every role does with verdicts that are no numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmray.config.rewards import AnswerReward, LengthReward, RepetitionReward
from fmray.rlhf.records import Rollouts
from fmray.rlhf.scorers import build_scorer
from fmray.rlhf.scoring import RewardRole, Verdict, describe_sample, texts_to_score, verdicts_of
from tests.unit.rlhf.answers import answers
from tests.unit.rlhf.judges import HERE

IDS = st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=5)


def said(rows: list[list[int]], ended: list[bool]) -> Rollouts:
    """Rollouts that said these ids; those that ended have an EOS (id 1, which may also stand inside) behind them."""
    ids = [[*row, 1] if end else row for row, end in zip(rows, ended, strict=True)]
    return answers(["…"] * len(rows), ids=ids, ended=ended)


@given(rows=IDS, low=st.integers(0, 6), more=st.integers(0, 4), data=st.data())
def test_length_counts_real_tokens_without_eos(
    rows: list[list[int]], low: int, more: int, data: st.DataObject
) -> None:
    ended = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    config = LengthReward(min_tokens=low, max_tokens=max(1, low + more), scale=4)
    scores = build_scorer(config, HERE).score(said(rows, ended))
    assert not scores.failures
    for row, score in zip(rows, scores.raw_B.tolist(), strict=True):
        inside = range(low, config.max_tokens + 1)
        assert score == -min(abs(len(row) - fine) for fine in inside) / 4


@given(rows=IDS, n=st.integers(1, 3), data=st.data())
def test_repetition_is_the_share_of_ngrams_that_stood_before(
    rows: list[list[int]], n: int, data: st.DataObject
) -> None:
    ended = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    scores = build_scorer(RepetitionReward(n=n), HERE).score(said(rows, ended)).raw_B.tolist()
    for row, score in zip(rows, scores, strict=True):
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        repeated = sum(gram in grams[:place] for place, gram in enumerate(grams))
        assert score == pytest.approx(-repeated / len(grams) if grams else 0)


def test_rules_of_known_rows() -> None:
    rollouts = said([[5, 6, 5, 6, 5], [], [7, 7, 7, 7]], [True, True, False])
    assert build_scorer(RepetitionReward(n=2), HERE).score(rollouts).raw_B.tolist() == pytest.approx(
        [-0.5, 0, -2 / 3]
    )
    lengths = LengthReward(min_tokens=2, max_tokens=4, scale=2)
    assert build_scorer(lengths, HERE).score(rollouts).raw_B.tolist() == [-0.5, -1, 0]


class Says(RewardRole):
    """Verdicts as given."""

    def __init__(self, *verdicts: Verdict) -> None:
        self._verdicts = verdicts

    def judge(self, rollouts: Rollouts) -> Sequence[Verdict]:
        return self._verdicts


def test_what_is_no_finite_number_is_nan_with_a_line_about_the_sample_never_zero() -> None:
    rollouts = answers(["fine", "x" * 500, "", "so", "big"], prompts=["A\nB"] * 5)
    scores = Says(0.5, "it took too long", math.nan, -math.inf, 1e300).score(rollouts)
    assert scores.raw_B.dtype == torch.float32
    assert scores.raw_B.isnan().tolist() == [False, True, True, True, True]  # 1e300 is beyond float32
    assert len(scores.failures) == 4
    assert scores.failures[0] == f"sample 61 (prompt 'A\\nB', response '{'x' * 120}…'): it took too long"
    assert [line.split(": ")[-1] for line in scores.failures[1:]] == [
        "its score is nan, not a finite number",
        "its score is -inf, not a finite number",
        "its score is 1e+300, not a finite number",
    ]
    assert all("\n" not in line for line in scores.failures)


def test_verdicts_of_what_others_return() -> None:
    assert verdicts_of([1, 2.5, True, "3", None, 10**400], 6) == [
        1.0,
        2.5,
        "its score is True, not a number",
        "its score is '3', not a number",
        "its score is None, not a number",
        f"its score is {str(10**400)[:120]}… (int), beyond all floats",
    ]
    assert verdicts_of([1.0], 2) == ["there are 1 scores for 2 texts"] * 2
    assert verdicts_of({"a": 1}, 1) == ["the scores are {'a': 1}, not a list of 1 numbers"]


def test_texts_of_samples() -> None:
    rollouts = answers(["said", " said", "?", ""], prompts=["It is", "It is", "It is", "It is"])
    assert texts_to_score(rollouts, "response") == ["said", " said", "?", ""]
    assert texts_to_score(rollouts, "prompt_and_response") == ["It is said", "It is said", "It is?", "It is"]
    assert describe_sample(rollouts, 2) == "sample 62 (prompt 'It is', response '?')"


ANSWER_CASES: list[tuple[str, str, tuple[str, ...], float]] = [
    ("exact", "red", ("red",), 1),
    ("exact", " Red ", ("red",), 1),
    ("exact", "red.", ("red",), 0),
    ("exact", "dark red", ("red",), 0),
    ("exact", "", ("red",), 0),
    ("exact", "crimson", ("red", "crimson"), 1),
    ("vqa_accuracy", "Red.", ("red",), 1),
    ("vqa_accuracy", "two", ("2", "2", "2", *["3"] * 7), 0.9),
    ("vqa_accuracy", "red", ("red", *["blue"] * 9), 0.3),
    ("vqa_accuracy", "green", ("red", *["blue"] * 9), 0),
    ("anls", "rad", ("red",), 2 / 3),
    ("anls", "rxx", ("red",), 0),
    ("anls", "blue", ("red", "blues"), 0.8),
]


@pytest.mark.parametrize(("metric", "said", "known", "score"), ANSWER_CASES)
def test_an_answer_is_as_right_as_its_measure_says(
    metric: str, said: str, known: tuple[str, ...], score: float
) -> None:
    rollouts = replace(answers([said, "red"]), answers=(known, ("red",)))
    config = AnswerReward.model_validate({"metric": metric})
    scores = build_scorer(config, HERE).score(rollouts)
    assert scores.raw_B.tolist() == pytest.approx([score, 1])
    assert not scores.failures


def test_an_answer_that_nobody_knows_has_no_score() -> None:
    cure = "its prompt has no answers to compare with; prompts.source.kind=questions brings them"
    scores = build_scorer(AnswerReward(), HERE).score(replace(answers(["a", "b"]), answers=((), ("b",))))
    assert scores.raw_B[0].isnan()
    assert scores.raw_B[1] == 1
    assert scores.failures == (f"sample 60 (prompt 'prompt 0', response 'a'): {cure}",)
    without = build_scorer(AnswerReward(), HERE).score(answers(["a", "b"]))
    assert without.raw_B.isnan().all()
    assert len(without.failures) == 2


def test_answers_are_not_normalised_and_stay_at_the_learners_unless_asked() -> None:
    config = AnswerReward()
    assert (config.normalize, config.pool.replicas, config.metric) == ("none", 0, "exact")
