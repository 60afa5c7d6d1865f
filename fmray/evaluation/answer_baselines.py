"""What is gained by looking: answers from the question alone, and the one answer that is given most, from the training split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fmray.errors import DataError
from fmray.types import Dialogue, Turn

START = 2
"""Words of a question that an unseen one is answered by."""


@dataclass(frozen=True, slots=True)
class AnswerBaselines:
    """Two models without eyes.

    `AnswerBaselines("yes", {"what color is it?": "red"}, {"what color": "blue"}).question_only("What color is that?")`
    is "blue".
    """

    majority: str
    """The most frequent answer."""
    by_question: dict[str, str]
    """A folded question → its most frequent answer."""
    by_start: dict[str, str]
    """A question's first words, folded → the most frequent answer of all questions that begin so."""

    def seen(self, question: str) -> bool:
        """Whether the very question was asked in training."""
        return folded(question) in self.by_question

    def question_only(self, question: str) -> str:
        """The most frequent answer to the question, else to its beginning, else of all."""
        question = folded(question)
        return self.by_question.get(question) or self.by_start.get(start(question)) or self.majority


def learn_baselines(train: Iterable[Dialogue], questions: Iterable[str]) -> AnswerBaselines:
    """Counts the training answers to these questions, every turn of a dialogue; of equally frequent ones the first by alphabet.

    Only what is asked is counted: a split of a million different questions fits. Raises DataError where there is no answer.
    """
    asked = {folded(question) for question in questions}
    starts = {start(question) for question in asked}
    everything: Counter[str] = Counter()
    by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_start: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for dialogue in train:
        for turn in dialogue.turns:
            answer, question = turn.answer.strip(), folded(question_of(turn))
            if not answer:
                continue
            everything[answer] += 1
            if question in asked:
                by_question[question][answer] += 1
            if start(question) in starts:
                by_start[start(question)][answer] += 1
    if not everything:
        raise DataError("the training split has no answer: there is no baseline to measure against")
    return AnswerBaselines(
        most_frequent(everything),
        {question: most_frequent(counts) for question, counts in by_question.items()},
        {words: most_frequent(counts) for words, counts in by_start.items()},
    )


def question_of(turn: Turn) -> str:
    """A turn's question as one text, pictures left out: `Dialogue.question` of any turn."""
    return " ".join(part.strip() for part in turn.question if part.strip())


def folded(question: str) -> str:
    """Lower case, single spaces: what makes two questions the same."""
    return " ".join(question.casefold().split())


def start(question: str) -> str:
    """The first words of a folded question."""
    return " ".join(question.split()[:START])


def most_frequent(counts: Counter[str]) -> str:
    """The answer with the highest count."""
    return min(counts, key=lambda answer: (-counts[answer], answer))
