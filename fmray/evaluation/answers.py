"""A test split's questions put to a model that answers, and what comes of it: the numbers, and what it got wrong.

Batches are cut from the split, not from a rank's share, and whole batches are dealt to ranks: which questions are
answered together does not depend on the number of ranks.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fmray.config.answers import AnswerEvaluateConfig
from fmray.config.schema import ImageConfig
from fmray.data.dialogue_loader import decoded_pictures
from fmray.data.dialogues import DialogueSource
from fmray.data.verdicts import spread
from fmray.errors import DataError
from fmray.evaluation.answer_baselines import learn_baselines
from fmray.evaluation.captions import bleu, rank_by_likelihood
from fmray.evaluation.embed import measuring
from fmray.evaluation.retrieval import slices
from fmray.evaluation.vqa_accuracy import anls, exact_match, relaxed, vqa_accuracy
from fmray.models.answering import Answering
from fmray.runtime.context import Context
from fmray.types import Dialogue, Metrics, Pictures

log = logging.getLogger(__name__)

CAPTION = "caption"
"""Type of the dialogues of a caption source."""
YES_NO = "yes_no"
"""In the name of every type of question that is answered by yes or no."""
EXAMPLES = 12
"""Answers that are shown as they come, right and wrong."""
CONFUSED = 24
"""A split with more different answers has no confusion matrix."""
OTHER = "(another)"
"""Column of what is no answer of the split."""
SEED = 0
"""Of the blocks of captions: the same for all evaluations, so that they compare."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with what the model said. `Answered(Dialogue(…, answers=("red",)), "red")`."""

    dialogue: Dialogue
    said: str

    @property
    def references(self) -> tuple[str, ...]:
        """What people said."""
        return references(self.dialogue)

    @property
    def score(self) -> float:
        """0..1: VQA accuracy where several people answered, else exact match."""
        if len(self.references) > 1:
            return vqa_accuracy(self.said, self.references)
        return float(exact_match(self.said, self.references))

    def row(self) -> dict[str, Any]:
        """For `evaluation.json`."""
        return {
            "name": self.dialogue.name,
            "picture": next(iter(self.dialogue.pictures), None),
            "question": self.dialogue.question,
            "kind": self.dialogue.kind,
            "said": self.said,
            "answers": list(self.references),
            "score": self.score,
        }


def references(dialogue: Dialogue) -> tuple[str, ...]:
    """What people said to the last turn, at least the turn's own answer."""
    return dialogue.answers or (dialogue.turns[-1].answer,)


def evaluate_answers(
    answering: Answering,
    source: DialogueSource,
    config: AnswerEvaluateConfig,
    context: Context,
    train_source: DialogueSource,
    *,
    max_bad_share: float = 0.01,
) -> tuple[Metrics, dict[str, Any]]:
    """The numbers of a model on a test split, the same on every rank, and the rest of `evaluation.json`.

    Questions: `eval/exact_match` (one of the answers), `eval/vqa_accuracy` and `eval/anls`, exact match by type
    (`eval/exact_match/color`, `eval/exact_match/not_yes_no`), and beside it `eval/question_only` and `eval/majority`:
    exact match of answers that need no picture, learned from `train_source`. Captions: `eval/exact_match`, `eval/bleu4`
    (0..100) and, with `config.choices`, `eval/rank/sum` and its company.

    The model stays in the mode it was in. Raises DataError where there is no question, or where more than
    `max_bad_share` of the questions' pictures cannot be read; fewer are left out, counted and named in the log.
    """
    chosen = [source[index] for index in spread(tuple(range(len(source))), config.max_samples)]
    if not chosen:
        raise DataError("the test split is empty: there is nothing to evaluate on")
    with measuring(answering.model):
        answered, unreadable = answer_all(answering, source, chosen, config, context)
        check_readable(unreadable, len(chosen), max_bad_share)
        ranked: Metrics = {}
        if config.choices is not None:
            asked = [each.dialogue for each in answered]
            read = partial(decoded_pictures, source, image=answering.image)
            rows = config.batch_size
            ranked = rank_by_likelihood(
                answering, asked, read, config.choices, SEED, context, batch_size=rows
            )
    details: dict[str, Any] = {"questions": len(answered), "unreadable": len(unreadable)}
    if config.choices is not None or all(each.dialogue.kind == CAPTION for each in answered):
        metrics, more = caption_results(answered)
    else:
        metrics, more = question_results(answered, train_source)
    if config.choices is not None:
        more["ranking"] = {"choices": config.choices, "chance": 1 / config.choices}
    metrics = {f"eval/{name}": value for name, value in (metrics | ranked).items()}
    return metrics, details | more | shown(answered, config.gallery)


# ---------------------------------------------------------------------------------------------------------- answering


def answer_all(
    answering: Answering,
    source: DialogueSource,
    dialogues: Sequence[Dialogue],
    config: AnswerEvaluateConfig,
    context: Context,
) -> tuple[list[Answered], dict[str, str]]:
    """Every readable question with its answer, in order, and why the other ones cannot be read, by name; on every rank."""
    batches = picture_batches(dialogues, config.batch_size)
    each = -(-len(batches) // context.world_size)
    said: dict[str, str] = {}
    bad: dict[str, str] = {}
    for batch in batches[context.rank * each : (context.rank + 1) * each]:
        pictures, damaged = readable_pictures(source, [dialogues[place] for place in batch], answering.image)
        reasons = {
            place: [damaged[key] for key in dialogues[place].pictures if key in damaged] for place in batch
        }
        bad |= {str(place): found[0] for place, found in reasons.items() if found}
        whole = [place for place in batch if not reasons[place]]
        if whole:
            answers = answering.answer([dialogues[place] for place in whole], pictures, beams=config.beams)
            said |= {str(place): one.text for place, one in zip(whole, answers, strict=True)}
    everyones = [json.loads(text) for text in context.gather_texts(json.dumps([said, bad]))]
    texts_of = {int(place): text for found, _ in everyones for place, text in found.items()}
    reasons_of = {int(place): reason for _, found in everyones for place, reason in found.items()}
    answered = [Answered(dialogues[place], texts_of[place]) for place in sorted(texts_of)]
    return answered, {dialogues[place].name: reasons_of[place] for place in sorted(reasons_of)}


def picture_batches(dialogues: Sequence[Dialogue], size: int) -> list[list[int]]:
    """Places of dialogues, those of one picture together, so that it is decoded once: whole groups, at most `size` places.

    A group that is larger than that is cut, and its picture decoded for each piece.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, dialogue in enumerate(dialogues):
        groups.setdefault(dialogue.pictures, []).append(place)
    batches: list[list[int]] = []
    for group in groups.values():
        for part in slices(len(group), size):
            piece = group[part]
            if batches and len(batches[-1]) + len(piece) <= size:
                batches[-1] += piece
            else:
                batches.append(list(piece))
    return batches


def readable_pictures(
    source: DialogueSource, dialogues: Sequence[Dialogue], image: ImageConfig
) -> tuple[Pictures, dict[str, str]]:
    """The pictures of some dialogues, and why the other ones cannot be read."""
    keys, pixels, damaged = [], [], {}
    for key in dict.fromkeys(key for dialogue in dialogues for key in dialogue.pictures):
        try:
            pixels.append(decoded_pictures(source, (key,), image).pixels_NCHW)
            keys.append(key)
        except DataError as error:
            damaged[key] = str(error)
    there = [tensor for tensor in pixels if tensor is not None]
    return Pictures(tuple(keys), torch.cat(there) if there else None), damaged


def check_readable(unreadable: dict[str, str], count: int, max_bad_share: float) -> None:
    """Names what is left out; raises DataError where it is too much."""
    for name, reason in unreadable.items():
        log.warning("left out of the evaluation: %s: %s", name, reason)
    if len(unreadable) > max_bad_share * count or len(unreadable) == count:
        share = f"more than data.max_bad_share={max_bad_share}"
        first = next(iter(unreadable.values()))
        raise DataError(
            f"{len(unreadable)} of {count} test questions have no readable picture, {share}; {first}"
        )


# ---------------------------------------------------------------------------------------------------------- measuring


def question_results(
    answered: Sequence[Answered], train_source: DialogueSource
) -> tuple[Metrics, dict[str, Any]]:
    """Numbers of a split of questions, beside those of answers that need no picture."""
    questions = [each.dialogue.question for each in answered]
    train = (train_source[index] for index in range(len(train_source)))
    baselines = learn_baselines(train, questions)
    blind = {
        "question_only": [
            Answered(each.dialogue, baselines.question_only(each.dialogue.question)) for each in answered
        ],
        "majority": [Answered(each.dialogue, baselines.majority) for each in answered],
    }
    metrics = measures(answered) | {name: matches(rows) for name, rows in blind.items()}
    kinds: list[dict[str, Any]] = [
        {"kind": kind, "questions": len(places), **measures([answered[place] for place in places])}
        | {name: matches([rows[place] for place in places]) for name, rows in blind.items()}
        for kind, places in by_kind(answered).items()
    ]
    if len(kinds) > 1:
        metrics |= {f"exact_match/{metric_name(row['kind'])}": row["exact_match"] for row in kinds}
    open_ended = [each for each in answered if YES_NO not in metric_name(each.dialogue.kind)]
    if 0 < len(open_ended) < len(answered):
        metrics["exact_match/not_yes_no"] = matches(open_ended)
    described = {name: agreement(rows) for name, rows in blind.items()}
    unseen = sum(not baselines.seen(question) for question in questions) / len(questions)
    return metrics, {
        "kinds": kinds,
        "confusion": confusion(answered),
        "baselines": described,
        "majority_answer": baselines.majority,
        "unseen_questions": unseen,
    }


def caption_results(answered: Sequence[Answered]) -> tuple[Metrics, dict[str, Any]]:
    """Numbers of a split of captions."""
    said, known = [each.said for each in answered], [each.references for each in answered]
    score, signature = bleu(said, known)
    return {"exact_match": matches(answered), "bleu4": score}, {"bleu_signature": signature}


def measures(answered: Sequence[Answered]) -> Metrics:
    """Means over questions of everything that is measured."""
    means = agreement(answered) | {"anls": mean(answered, anls), "relaxed": mean(answered, relaxed)}
    if several := by_several(answered):
        always = partial(vqa_accuracy, mode="normalise_always")
        means["vqa_accuracy_normalise_always"] = mean(several, always)
    return means


def agreement(answered: Sequence[Answered]) -> Metrics:
    """Exact match, and VQA accuracy over the questions that several people answered, where there are any."""
    several = by_several(answered)
    return {"exact_match": matches(answered)} | (
        {"vqa_accuracy": mean(several, vqa_accuracy)} if several else {}
    )


def by_several(answered: Sequence[Answered]) -> list[Answered]:
    """Those that several people answered."""
    return [each for each in answered if len(each.references) > 1]


def mean(answered: Sequence[Answered], measure: Callable[[str, Sequence[str]], float]) -> float:
    """A measure's mean over questions."""
    return sum(measure(each.said, each.references) for each in answered) / len(answered)


def matches(answered: Sequence[Answered]) -> float:
    """Share of exact matches."""
    return mean(answered, exact_match)


def by_kind(answered: Sequence[Answered]) -> dict[str, list[int]]:
    """Places of the questions of each type, types by name."""
    places: dict[str, list[int]] = {}
    for place, each in enumerate(answered):
        places.setdefault(each.dialogue.kind, []).append(place)
    return dict(sorted(places.items()))


def confusion(answered: Sequence[Answered]) -> dict[str, Any] | None:
    """Which answer was said for which: `{"names": [...], "counts": [[...]]}`, the true one in rows, anything else last.

    None where there are more than `CONFUSED` answers, or several to a question.
    """
    true = [each.references[0].strip().casefold() for each in answered]
    names = sorted(set(true))
    if len(names) > CONFUSED or any(len(each.references) > 1 for each in answered):
        return None
    place = {name: row for row, name in enumerate(names)}
    counts = [[0] * (len(names) + 1) for _ in range(len(names) + 1)]
    for each, answer in zip(answered, true, strict=True):
        counts[place[answer]][place.get(each.said.strip().casefold(), len(names))] += 1
    return {"names": [*names, OTHER], "counts": counts}


def metric_name(kind: str) -> str:
    """A type of question in a metric's name: `yes/no` → `yes_no`; none → `untyped`."""
    return re.sub(r"\W+", "_", kind.casefold()).strip("_") or "untyped"


def shown(answered: Sequence[Answered], gallery: int) -> dict[str, Any]:
    """Wrong answers for the gallery and answers of all kinds, both evenly spread over the split."""
    wrong = tuple(each for each in answered if each.score == 0)
    return {
        "gallery": [each.row() for each in spread(wrong, gallery)],
        "examples": [each.row() for each in spread(tuple(answered), EXAMPLES)],
    }
