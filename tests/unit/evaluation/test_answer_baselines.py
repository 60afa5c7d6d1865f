"""Answers without eyes, counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmray.errors import DataError
from fmray.evaluation.answer_baselines import learn_baselines
from fmray.types import Dialogue, Turn


def asked(question: str, answer: str) -> Dialogue:
    return Dialogue("n", ("p",), (Turn(("", question), answer),))


TRAIN = [
    asked("what color is it?", "red"),
    asked("What color  is it?", "red"),
    asked("what color is it?", "blue"),
    asked("what color is that?", "green"),
    asked("what color is this?", "green"),
    asked("what color has it?", "green"),
    asked("is it red?", "yes"),
    asked("is it blue?", "yes"),
    asked("is it blue?", "no"),
    asked("are there two?", "yes"),
]


def test_a_seen_question_then_its_beginning_then_the_majority() -> None:
    questions = ["what color is it?", "what color was it?", "how many?", "is it blue?"]
    baselines = learn_baselines(TRAIN, questions)
    assert baselines.majority == "green"  # as often as yes, and first by alphabet
    assert baselines.question_only("What color is it? ") == "red"
    assert baselines.question_only("what color was it?") == "green"
    assert baselines.question_only("how many?") == "green"
    assert baselines.question_only("is it blue?") == "no"  # once each
    assert baselines.seen("WHAT color is it?")
    assert not baselines.seen("how many?")


def test_only_what_is_asked_is_kept() -> None:
    baselines = learn_baselines(TRAIN, ["is it blue?"])
    assert set(baselines.by_question) == {"is it blue?"}
    assert baselines.by_start == {"is it": "yes"}


def test_every_turn_counts_and_silent_ones_do_not() -> None:
    turns = (
        Turn(("", "who?", ""), "a man"),
        Turn(("where?",), "here"),
        Turn(("where?",), " "),
        Turn(("why?",), ""),
    )
    baselines = learn_baselines([Dialogue("d", ("a", "b"), turns)], ["where?", "who?", "why?"])
    assert baselines.by_question == {"who?": "a man", "where?": "here"}
    assert baselines.question_only("why?") == "a man"


@given(st.permutations(TRAIN))
def test_the_order_of_the_split_does_not_matter(train: list[Dialogue]) -> None:
    questions = ["what color is it?", "is it blue?", "what shape?"]
    assert learn_baselines(train, questions) == learn_baselines(TRAIN, questions)


def test_a_split_without_answers_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"^the training split has no answer: there is no baseline to measure against$"
    ):
        learn_baselines([asked("who?", "")], ["who?"])
