"""Questions in json files beside a folder of pictures: easy-VQA and the official layout of VQA v2."""

from __future__ import annotations

from collections import Counter
from sys import intern
from typing import Any

from fmray.assets import fetch
from fmray.config.dialogues import VqaV2Source
from fmray.data.dialogues import FolderPictures, ListedDialogues, asked, entry_value, read_json
from fmray.data.sources import Split, data_folder
from fmray.errors import ConfigError, DataError
from fmray.types import Dialogue

# ------------------------------------------------------------------------------------------------------------ easy-VQA


def open_easy_vqa(split: Split) -> ListedDialogues:
    """The questions of the pinned asset: 38,575 about 4,000 pictures to train on, 9,673 about 1,000 to measure on.

    Dialogues are called `easy_vqa[test]#17`, their pictures `test/images/3.png`; kinds are yes/no, color and shape.
    Raises AssetError.
    """
    root = fetch("easy_vqa") / "data"
    rows = read_json(str(root / split / "questions.json"), "asset:easy_vqa")
    pictures = {number: intern(f"{split}/images/{number}.png") for _, _, number in rows}
    return ListedDialogues(
        tuple(
            asked(
                f"easy_vqa[{split}]#{row}",
                pictures[number],
                question,
                intern(answer),
                kind=_easy_kind(question, answer),
            )
            for row, (question, answer, number) in enumerate(rows)
        ),
        FolderPictures(root),
    )


def _easy_kind(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "color" if "color" in question else "shape"


# -------------------------------------------------------------------------------------------------------------- VQA v2


def open_vqa_v2(config: VqaV2Source, split: Split) -> ListedDialogues:
    """The questions with their annotations, in the questions' order; called by their number, of the kind `answer_type`.

    The answer is `multiple_choice_answer`, which is what most of the ten people said. Pictures are called
    `<split>/<file>`. Raises DataError for a file or an annotation that is not there, ConfigError for the name of files.
    """
    train = split == "train"
    questions_key, questions_path = _key_and_path(config, split, "questions")
    annotations_key, annotations_path = _key_and_path(config, split, "annotations")
    folder = data_folder(config.train_images if train else config.test_images, f"data.source.{split}_images")
    questions = _rows(questions_path, questions_key, "questions")
    annotations = {
        entry_value(row, "question_id", (int, str), f"{annotations_path}: annotation {place}"): row
        for place, row in enumerate(_rows(annotations_path, annotations_key, "annotations"))
    }
    dialogues = []
    for place, row in enumerate(questions):
        number = entry_value(row, "question_id", (int, str), f"{questions_path}: question {place}")
        if number not in annotations:
            raise DataError(f"{annotations_key}={annotations_path!r}: has no annotation of question {number}")
        dialogue = _vqa_dialogue(row, annotations[number], config.file_name, split)
        if not train or _consensus(dialogue) >= config.consensus:
            dialogues.append(dialogue)
    if not dialogues:
        asked_of = f"none of the {len(questions)} questions in {questions_path}"
        raise DataError(f"data.source.consensus={config.consensus}: {asked_of} has so many equal answers")
    return ListedDialogues(tuple(dialogues), FolderPictures(folder, f"{split}/"))


def _key_and_path(config: VqaV2Source, split: Split, what: str) -> tuple[str, str]:
    name = f"{split}_{what}"
    return f"data.source.{name}", str(getattr(config, name))


def _rows(path: str, key: str, name: str) -> list[Any]:
    rows: list[Any] = entry_value(read_json(path, key), name, list, f"{key}={path!r}")
    if not rows:
        raise DataError(f"{key}={path!r}: '{name}' is empty")
    return rows


def _vqa_dialogue(question: Any, annotation: Any, file_name: str, split: Split) -> Dialogue:
    number = question["question_id"]
    where = f"question {number}"
    text = entry_value(question, "question", str, where)
    file = _file_name(file_name, split, entry_value(question, "image_id", (int, str), where))
    where = f"annotation of question {number}"
    answers = tuple(
        intern(entry_value(said, "answer", str, where))
        for said in entry_value(annotation, "answers", list, where)
    )
    return asked(
        str(number),
        intern(f"{split}/{file}"),
        text,
        intern(entry_value(annotation, "multiple_choice_answer", str, where)),
        answers=answers,
        kind=intern(annotation.get("answer_type") or ""),
    )


def _file_name(template: str, split: Split, image_id: int | str) -> str:
    try:
        return template.format(split="train" if split == "train" else "val", image_id=image_id)
    except (KeyError, IndexError, ValueError) as error:
        cure = f"write {{split}} and {{image_id:012d}} where they go; image {image_id!r} fails ({error})"
        raise ConfigError("data.source.file_name", template, cure) from None


def _consensus(dialogue: Dialogue) -> float:
    """Share of people who gave the most frequent answer; 1 where the answers are not known."""
    counts = Counter(dialogue.answers)
    return max(counts.values()) / counts.total() if counts else 1.0
