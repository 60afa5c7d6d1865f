"""Is what was said right? VQA accuracy with the official processing of answers, exact match, ANLS, ChartQA's relaxed match.

Every function takes what the model said and what people said to one question, and gives 0..1; a question without an
answer cannot be measured and is a DataError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from fmray.errors import DataError

Mode = Literal["official", "normalise_always"]

AGREEING = 3
"""Other people who must have given an answer for it to be wholly right."""
PERIODS = 32
"""The official script passes `re.UNICODE`, which is 32, where `re.sub` expects a count: later periods stay."""
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Removed, or made a space; no colon and no apostrophe among them, as in the official script since its version 2."""
PERIOD = re.compile(r"\.(?!\d)")
"""The official pattern has `(?!<=\\d)` before it, a slip that matches everywhere, so this is what it finds."""
COMMA_IN_NUMBER: dict[Mode, re.Pattern[str]] = {
    "official": re.compile(r"\d,\d"),
    "normalise_always": re.compile(r"\d,+\d"),
}
REMEMBERED = 1 << 16
"""Texts processed and pairs compared that are kept: answers repeat by the thousand."""
ARTICLES = frozenset(("a", "an", "the"))
COUNTING = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(COUNTING.split())}

CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've
y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
"""Words that lack one apostrophe → with it. `somebody'd` goes the wrong way, as it does in the official table."""


@lru_cache(maxsize=REMEMBERED)
def normalise_answer(text: str, mode: Mode = "official") -> str:
    """An answer as the official VQA evaluation compares it: `"A dog."` → `"dog"`, `"Two, dont!"` → `"2 don't"`.

    Line breaks and tabs become spaces. A mark of punctuation goes where it stands beside a space, or where the answer
    has a comma between digits (`"1,000"` → `"1000"`); elsewhere it becomes a space (`"red-ish"` → `"red ish"`). Periods
    that no digit follows go, the first 32 of them (the official script's slip). Then lower case, number words up to ten
    and `none` as digits, no articles, apostrophes put back into contractions. It may leave nothing (`"A"` → `""`).

    Of lmms-eval's variant (`normalise_always`) one thing differs: several commas between digits count as one.
    """
    text = one_line(text)
    in_number = COMMA_IN_NUMBER[mode].search(text) is not None
    kept = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_space or in_number else " ")
    words = [NUMBERS.get(word, word) for word in PERIOD.sub("", kept, count=PERIODS).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    """Line breaks and tabs as spaces, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(said: str, answers: Sequence[str], mode: Mode = "official") -> float:
    """VQA accuracy (Antol et al. 2015, section 3): the mean over people of min(1, others who gave this answer / 3).

    Each person is held out once, by place, so k of ten equal answers give 0, .3, .6, .9, 1, 1, …. (The official script
    holds out by `item != gtAnsDatum`, which is the same only while items carry an `answer_id`: without one it would drop
    every equal answer with it.)

    `official`, as the script stands now (its first revisions processed what was said in any case): where all people
    gave the very same answer, nothing is processed, the case of letters included; else both sides go through
    `normalise_answer`. `normalise_always`: both sides always do, as in lmms-eval.

    With fewer than four people three others cannot agree: the divisor is then the number of others (the official rule
    has no such case), and for a single person it is an exact match of the processed answers.
    """
    answers = [one_line(answer) for answer in _known(said, answers)]
    said = one_line(said)
    if mode == "normalise_always" or len(set(answers)) > 1 or len(answers) == 1:
        said, answers = normalise_answer(said, mode), [normalise_answer(answer, mode) for answer in answers]
    matches, people = sum(answer == said for answer in answers), len(answers)
    if people == 1:
        return float(matches)
    needed = min(AGREEING, people - 1)
    held_out_match, held_out_other = (min(1.0, others / needed) for others in (matches - 1, matches))
    return (matches * held_out_match + (people - matches) * held_out_other) / people


def exact_match(said: str, answers: Sequence[str]) -> bool:
    """Whether it is one of the answers, but for case and spaces around it."""
    return said.strip().casefold() in {answer.strip().casefold() for answer in _known(said, answers)}


def anls(said: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al. 2019, equation 1), 0 below the threshold.

    The best of 1 - distance / length of the longer one, in lower case, runs of spaces as one. lmms-eval divides by the
    length before spaces are joined, so it gives more where there are such runs.
    """
    plain = " ".join(said.lower().split())
    best = max(similarity(plain, " ".join(answer.lower().split())) for answer in set(_known(said, answers)))
    return best if best >= threshold else 0.0


@lru_cache(maxsize=REMEMBERED)
def similarity(one: str, other: str) -> float:
    """1 - edits / length of the longer text; 1 for two empty ones."""
    longest = max(len(one), len(other))
    return 1.0 if one == other else 1 - edits(one, other) / longest


def edits(one: str, other: str) -> int:
    """Levenshtein distance: letters to insert, delete or replace."""
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        line = [row]
        for column, target in enumerate(other, 1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (letter != target)))
        above = line
    return above[-1]


def relaxed(said: str, answers: Sequence[str], tolerance: float = 0.05) -> bool:
    """ChartQA's match (Masry et al. 2022, section 5.1): a number within 5 % of the answer, another text exactly.

    `12%` is 0.12. Against 0 no share can be taken: the texts are compared, as for whatever is no finite number.
    """
    return any(_near(said.strip(), answer.strip(), tolerance) for answer in _known(said, answers))


def _near(said: str, answer: str, tolerance: float) -> bool:
    number, target = as_number(said), as_number(answer)
    if number is None or not target:
        return said.lower() == answer.lower()
    return abs(number - target) / abs(target) <= tolerance


def as_number(text: str) -> float | None:
    """A finite number, percents as shares of one; None for other texts."""
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _known(said: str, answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str):
        raise DataError(
            f"answers={answers!r}: one text where a list of answers is expected; write [{answers!r}]"
        )
    if not answers:
        raise DataError(f"{said!r} was said to a question without an answer: nothing to compare with")
    return answers
