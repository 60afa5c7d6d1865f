"""A split of questions through a model: the arithmetic with answers from a table, the whole with a tiny VQA model."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from fmray.config.answers import AnswerEvaluateConfig
from fmray.config.schema import ImageConfig
from fmray.data.dialogues import ListedDialogues
from fmray.errors import DataError
from fmray.evaluation.answers import evaluate_answers, metric_name, picture_batches
from fmray.models.answering import Said
from fmray.types import Dialogue, Metrics, Pictures, Turn
from tests.tiny_vqa import asked, tiny_vqa
from tests.unit.evaluation.contexts import context
from tests.workers import run_workers

SIDE = 16


@dataclass
class DrawnPictures:
    """Pictures by number, one of which may be damaged; counts what is read."""

    damaged: str = ""
    reads: list[str] = field(default_factory=list)

    def read(self, key: str) -> bytes:
        self.reads.append(key)
        if key == self.damaged:
            return b"no picture"
        draw = torch.Generator().manual_seed(int(key.removesuffix(".png")))
        stream = io.BytesIO()
        pixels_HWC = torch.randint(0, 256, (SIDE, SIDE, 3), generator=draw).byte()
        Image.fromarray(pixels_HWC.numpy()).save(stream, "PNG")
        return stream.getvalue()


class Table:
    """Says what a table holds, by the dialogue's name, and notes what was asked together; no tensors."""

    image = ImageConfig(size=SIDE)

    def __init__(self, said: dict[str, str]) -> None:
        self.said, self.asked = said, []
        self.model = nn.Linear(1, 1)

    def answer(self, dialogues: Sequence[Dialogue], pictures: Pictures, *, beams: int = 1) -> list[Said]:
        assert beams == 3
        for dialogue in dialogues:
            assert set(dialogue.pictures) <= set(pictures.keys)
        self.asked.append([dialogue.name for dialogue in dialogues])
        return [Said(self.said[dialogue.name], 2, 5, True) for dialogue in dialogues]


def of(*dialogues: Dialogue, damaged: str = "") -> ListedDialogues:
    return ListedDialogues(dialogues, DrawnPictures(damaged))


def people(name: str, question: str, answers: str, kind: str) -> Dialogue:
    """Answers as words, the most frequent first."""
    words = tuple(answers.split())
    return Dialogue(name, ("1.png",), (Turn(("", question), words[0]),), words, kind)


TRAIN = of(
    asked("t0", "7.png", "what color is it?", "red"),
    asked("t1", "7.png", "what color is it?", "red"),
    asked("t2", "8.png", "is it red?", "yes"),
    asked("t3", "8.png", "is it blue?", "no"),
    asked("t4", "8.png", "is it blue?", "no"),
    asked("t5", "8.png", "is it green?", "no"),
)
TEST = (
    asked("a", "0.png", "what color is it?", "red", "color"),
    asked("b", "1.png", "what color is it?", "blue", "color"),
    asked("c", "0.png", "is it red?", "yes", "yes/no"),
    people("d", "is it green?", "no " * 8 + "yes yes", "yes/no"),
    people("e", "how many?", "2 " * 9 + "3", "count"),
)
SAID = {"a": "Red", "b": "blu", "c": "no", "d": "yes", "e": "two"}


def measure(
    said: dict[str, str], test: ListedDialogues, train: ListedDialogues = TRAIN, **keys: Any
) -> tuple[Metrics, dict[str, Any], Table]:
    model, share = Table(said), keys.pop("max_bad_share", 0.01)
    config = AnswerEvaluateConfig(beams=3, **keys)
    found = evaluate_answers(model, test, config, context(), train, max_bad_share=share)  # type: ignore[arg-type]
    return *found, model


def test_every_number_by_hand() -> None:
    metrics, details, _ = measure(SAID, of(*TEST))
    expected = {
        "eval/exact_match": 2 / 5,  # a; d: two of ten said so; e: processed by VQA accuracy alone
        "eval/anls": (1 + 0.75 + 0 + 1 + 0) / 5,
        "eval/relaxed": 2 / 5,
        "eval/vqa_accuracy": (0.6 + 1) / 2,
        "eval/vqa_accuracy_normalise_always": (0.6 + 1) / 2,
        "eval/question_only": (1 + 0 + 1 + 1 + 0) / 5,
        "eval/majority": (0 + 0 + 0 + 1 + 0) / 5,
        "eval/exact_match/color": 1 / 2,
        "eval/exact_match/yes_no": 1 / 2,
        "eval/exact_match/count": 0.0,
        "eval/exact_match/not_yes_no": 1 / 3,
    }
    assert metrics == pytest.approx(expected)
    assert details["majority_answer"] == "no"
    assert details["unseen_questions"] == 1 / 5
    assert details["questions"] == 5
    color = next(row for row in details["kinds"] if row["kind"] == "color")
    assert color["questions"] == 2
    assert (color["exact_match"], color["question_only"], color["majority"]) == (0.5, 0.5, 0.0)
    assert "vqa_accuracy" not in color
    assert details["baselines"]["question_only"]["vqa_accuracy"] == pytest.approx((1 + 0) / 2)
    json.dumps(details)


def test_the_gallery_holds_what_nobody_said() -> None:
    _, details, _ = measure(SAID, of(*TEST))
    assert [row["name"] for row in details["gallery"]] == ["b", "c"]
    assert details["gallery"][0] == {
        "name": "b",
        "picture": "1.png",
        "question": "what color is it?",
        "kind": "color",
        "said": "blu",
        "answers": ["blue"],
        "score": 0.0,
    }
    assert [row["name"] for row in details["examples"]] == list("abcde")
    assert measure(SAID, of(*TEST), gallery=1)[1]["gallery"][0]["name"] == "b"
    assert measure(SAID, of(*TEST), gallery=0)[1]["gallery"] == []


def test_a_small_set_of_answers_has_a_confusion() -> None:
    _, details, _ = measure(SAID | {"b": " RED"}, of(*TEST[:3]))
    assert details["confusion"] == {
        "names": ["blue", "red", "yes", "(another)"],
        "counts": [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]],
    }
    assert measure(SAID, of(*TEST))[1]["confusion"] is None  # ten people do not have one answer
    many = [asked(str(i), "0.png", "how many?", str(i)) for i in range(25)]
    assert measure({str(i): "1" for i in range(25)}, of(*many))[1]["confusion"] is None


def test_a_picture_is_read_once_and_its_questions_go_together() -> None:
    test = of(*TEST)
    _, _, model = measure(SAID, test, batch_size=2)
    assert model.asked == [["a", "c"], ["b", "d"], ["e"]]
    assert isinstance(test.pictures, DrawnPictures)
    assert test.pictures.reads == ["0.png", "1.png", "1.png"]  # three questions about 1.png, two at a time
    assert picture_batches(TEST, 3) == [[0, 2], [1, 3, 4]]
    assert picture_batches(TEST, 5) == [[0, 2, 1, 3, 4]]
    assert picture_batches(TEST, 1) == [[0], [2], [1], [3], [4]]


def test_samples_are_evenly_spread() -> None:
    _, details, model = measure(SAID, of(*TEST), max_samples=2)
    assert details["questions"] == 2
    assert model.asked == [["a", "c"]]


def test_an_unreadable_picture_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        metrics, details, model = measure(SAID, of(*TEST, damaged="0.png"), max_bad_share=0.5)
    assert model.asked == [["b", "d", "e"]]
    assert (details["questions"], details["unreadable"]) == (3, 2)
    assert metrics["eval/exact_match"] == pytest.approx(1 / 3)
    assert "a: 0.png: is not a PNG" in caplog.text
    wanted = r"^2 of 5 test questions have no readable picture, more than data\.max_bad_share=0\.1; 0\.png: is not a PNG.*$"
    with pytest.raises(DataError, match=wanted):
        measure(SAID, of(*TEST, damaged="0.png"), max_bad_share=0.1)
    with pytest.raises(DataError, match=r"^1 of 1 test questions have no readable picture"):
        measure(SAID, of(TEST[0], damaged="0.png"), max_bad_share=1.0)


def test_a_text_without_pictures_is_a_question_too() -> None:
    text = Dialogue("t", (), (Turn(("who?",), "me"),), kind="text")
    metrics, _, model = measure({"t": "me"}, of(text))
    assert model.asked == [["t"]]
    assert metrics["eval/exact_match"] == 1.0
    assert "eval/exact_match/text" not in metrics  # one type is all of them


def test_nothing_to_ask_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^the test split is empty: there is nothing to evaluate on$"):
        measure({}, of())


def test_names_of_types() -> None:
    assert metric_name("yes/no") == "yes_no"
    assert metric_name("What color is the") == "what_color_is_the"
    assert metric_name("") == "untyped"


def test_captions_have_bleu_and_no_baselines() -> None:
    words = "a small red dog runs"
    test = of(*(asked(str(i), f"{i}.png", "", words, "caption") for i in range(2)))
    metrics, details, _ = measure({"0": "A small red dog runs", "1": "no dog at all"}, test)
    assert set(metrics) == {"eval/exact_match", "eval/bleu4"}
    assert metrics["eval/exact_match"] == 0.5
    assert 0 < metrics["eval/bleu4"] < 100
    assert "kinds" not in details
    assert "version:" in details["bleu_signature"]


# ------------------------------------------------------------------------------------------------- with a real model


def real_questions() -> ListedDialogues:
    questions = ["what color is the circle ?", "is there a square ?", "how many circle ?"]
    kinds, answers = ["color", "yes/no", "count"], ["red", "yes", "two", "blue"]
    return of(
        *(asked(f"q{i}", f"{i % 5}.png", questions[i % 3], answers[i % 4], kinds[i % 3]) for i in range(17))
    )


def on_a_rank(rank: int, world_size: int, batch_size: int = 4) -> tuple[Metrics, dict[str, Any]]:
    questions = real_questions()
    config = AnswerEvaluateConfig(batch_size=batch_size)
    return evaluate_answers(tiny_vqa(), questions, config, context(rank, world_size), questions)


def test_a_real_model_answers_alike_in_any_batch_and_keeps_its_mode() -> None:
    model, questions = tiny_vqa(dropout=0.5), real_questions()
    assert model.model.training
    found = [
        evaluate_answers(model, questions, AnswerEvaluateConfig(batch_size=size), context(), questions)
        for size in (1, 5, 64)
    ]
    assert found[0] == found[1] == found[2]
    assert model.model.training
    metrics, details = found[0]
    assert details["questions"] == 17
    assert metrics["eval/question_only"] >= metrics["eval/majority"]
    said = {row["said"] for row in details["examples"]}
    assert len(said) > 1


@pytest.mark.slow
def test_a_real_model_ranks_captions() -> None:
    captions = ["red circle", "red square", "blue circle", "green triangle", "blue", "two left", "right"]
    test = of(*(asked(text, f"{i}.png", "", text) for i, text in enumerate(captions)))
    config = AnswerEvaluateConfig(choices=3, batch_size=8)
    metrics, details = evaluate_answers(tiny_vqa(), test, config, context(), test)
    shares = [metrics[f"eval/rank/{rule}"] for rule in ("sum", "mean", "pmi")]
    assert all(0 <= share <= 1 for share in shares)
    assert details["ranking"] == {"choices": 3, "chance": 1 / 3}
    assert {"eval/exact_match", "eval/bleu4"} < set(metrics)


@pytest.mark.slow
def test_two_ranks_find_what_one_finds() -> None:
    alone = on_a_rank(0, 1)
    assert run_workers(2, on_a_rank) == [alone, alone]
