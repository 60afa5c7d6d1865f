"""VQA accuracy against its closed form and the official quirks; exact match, ANLS, relaxed match."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmray.errors import DataError
from fmray.evaluation.vqa_accuracy import (
    anls,
    edits,
    exact_match,
    normalise_answer,
    relaxed,
    similarity,
    vqa_accuracy,
)

WORDS = st.text("abcdefg 0123.,'-?", max_size=12)


@pytest.mark.parametrize(
    ("matching", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), *((k, 1.0) for k in range(4, 11))]
)
def test_k_of_ten_is_the_closed_form(matching: int, accuracy: float) -> None:
    answers = ["red"] * matching + [f"other {index}" for index in range(10 - matching)]
    assert vqa_accuracy("red", answers) == pytest.approx(accuracy, abs=1e-12)
    assert vqa_accuracy("red", answers, "normalise_always") == pytest.approx(accuracy, abs=1e-12)


@given(st.lists(st.sampled_from(["red", "blue", "dark blue", "2"]), min_size=4, max_size=14), st.randoms())
def test_it_is_the_mean_over_held_out_people_in_any_order(answers: list[str], random: object) -> None:
    found = vqa_accuracy("red", answers)
    parts = []
    for held_out in range(len(answers)):
        others = answers[:held_out] + answers[held_out + 1 :]
        parts.append(min(1.0, others.count("red") / 3))
    assert found == pytest.approx(sum(parts) / len(parts), abs=1e-12)
    random.shuffle(answers)  # type: ignore[attr-defined]
    assert vqa_accuracy("red", answers) == found


def test_fewer_than_four_people() -> None:
    assert vqa_accuracy("a red", ["Red."]) == 1.0
    assert vqa_accuracy("blue", ["red"]) == 0.0
    assert vqa_accuracy("red", ["red", "red"]) == 1.0
    assert vqa_accuracy("red", ["red", "blue"]) == 0.5  # the other one is asked whether it agrees with blue's
    assert vqa_accuracy("red", ["red", "red", "red"]) == 1.0
    assert vqa_accuracy("red", ["red", "red", "blue"]) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert vqa_accuracy("red", ["red"] * 4) == 1.0


def test_where_all_say_the_same_the_official_rule_processes_nothing() -> None:
    assert vqa_accuracy("two", ["2"] * 10) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("\nthe moon ", ["the\tmoon"] * 10) == 1.0  # but for spaces
    assert vqa_accuracy("two", ["2"] * 10, "normalise_always") == 1.0
    assert vqa_accuracy("two", ["2"] * 9 + ["2."]) == 1.0  # one differs: everything is processed


@pytest.mark.parametrize(
    ("said", "processed"),
    [
        ("A dog.", "dog"),
        ("The\nred\tcar ", "red car"),
        ("Two, dont!", "2 don't"),
        ("1,000", "1000"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("red-ish", "red ish"),
        ("red - ish", "red ish"),
        ("3,000 red-ish", "3000 redish"),  # a comma between digits glues every mark
        ("1.5 m.", "1.5 m"),
        ("a.m", "am"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("A", ""),
        ("somebody'd", "somebodyd"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("12:30", "12:30"),
        ("." * 40, "." * 8),  # the count of 32
    ],
)
def test_official_processing(said: str, processed: str) -> None:
    assert normalise_answer(said) == processed


def test_several_commas_between_digits_are_where_lmms_eval_differs() -> None:
    assert normalise_answer("1,,2") == "1 2"
    assert normalise_answer("1,,2", "normalise_always") == "12"


@given(WORDS)
def test_processing_twice_changes_nothing_more(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once


@given(WORDS, st.lists(WORDS, min_size=1, max_size=10))
def test_every_measure_is_a_share_and_the_own_answer_is_right(said: str, answers: list[str]) -> None:
    for measure in (vqa_accuracy, anls, exact_match, relaxed):
        assert 0 <= measure(said, answers) <= 1
    assert exact_match(answers[0], answers)
    assert relaxed(answers[0], answers)
    assert anls(answers[0], answers) == 1
    assert vqa_accuracy(answers[0], answers[:1] * 10) == 1


def test_exact_match_folds_case_and_outer_spaces_alone() -> None:
    assert exact_match(" Red\n", ["blue", "RED"])
    assert exact_match("STRASSE", ["Straße"])
    assert not exact_match("red.", ["red"])


def test_anls_is_one_minus_the_share_of_edits_above_a_half() -> None:
    assert anls("Kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("abcd", ["abxy"]) == 0.5
    assert anls("abc", ["axy"]) == 0.0
    assert anls("a  big   dog", ["A big dog"]) == 1.0
    assert anls("cat", ["dog", "cats"]) == 0.75
    assert anls("", [""]) == 1.0
    assert anls("kitten", ["sitting"], threshold=0.6) == 0.0


@given(st.text("ab", max_size=6), st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_edits_are_a_metric(one: str, other: str, third: str) -> None:
    assert (edits(one, other) == 0) == (one == other)
    assert edits(one, other) == edits(other, one) <= max(len(one), len(other))
    assert edits(one, third) <= edits(one, other) + edits(other, third)
    assert 0 <= similarity(one, other) <= 1


def test_relaxed_takes_five_percent_of_a_number() -> None:
    assert relaxed("105", ["100"])
    assert not relaxed("105.1", ["100"])
    assert relaxed("-95", ["-100"])
    assert relaxed("12%", ["0.12"])
    assert relaxed("Red", ["red"])
    assert relaxed("0", ["0"])
    assert not relaxed("0.001", ["0"])  # no share of nothing
    assert not relaxed("inf", ["100"])
    assert relaxed("nan", ["nan"])
    assert relaxed("7", ["red", "7.1"])


def test_nothing_to_compare_with_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"^'red' was said to a question without an answer: nothing to compare with$"
    ):
        vqa_accuracy("red", [])
    with pytest.raises(
        DataError, match=r"^answers='red': one text where a list of answers is expected; write \['red'\]$"
    ):
        exact_match("red", "red")
