"""Questions about pictures in datasets of the Hugging Face hub, and in folders written by `datasets`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any

import datasets

from fmray.config.dialogues import HubVqaSource
from fmray.data.dialogues import ListedDialogues, asked
from fmray.data.hub import load_split
from fmray.data.sources import Split, picture_from, some
from fmray.errors import DataError


@dataclass(frozen=True, slots=True)
class HubPictures:
    """The picture column of a dataset, by row: `HubPictures(rows, "image", "test/").read("test/17")`."""

    dataset: Any
    column: str
    prefix: str

    def read(self, key: str) -> bytes:
        row = self.dataset[int(key.removeprefix(self.prefix))]
        return picture_from(row[self.column], Path(), key)


def open_hub_vqa(config: HubVqaSource, split: Split) -> ListedDialogues:
    """One split, a dialogue for each row, called `<path>[<split>]#<row>`; its picture is called `train/<row>` or `test/<row>`.

    The texts are read now, the pictures stay in the dataset's memory-mapped files. Raises DataError where it cannot be
    loaded, lacks a column, or a row has no question or answer.
    """
    wanted = config.train_split if split == "train" else config.test_split
    loaded = load_split(config.path, config.config_name, wanted, key="data.source.path")
    _require_columns(config, loaded.column_names)
    images = loaded.select_columns([config.image_column])
    if isinstance(images.features[config.image_column], datasets.Image):
        images = images.cast_column(config.image_column, datasets.Image(decode=False))
    texts = loaded.select_columns(
        [c for c in (config.question_column, config.answer_column, config.kind_column) if c is not None]
    )
    dialogues = []
    for number, row in enumerate(texts):
        where = f"{config.path}[{wanted}]#{number}"
        question = row[config.question_column]
        if not isinstance(question, str):
            raise DataError(f"{where}: the question must be a string, not {type(question).__name__}")
        answers = answers_from(row[config.answer_column], where)
        kind = row[config.kind_column] if config.kind_column else ""
        dialogues.append(
            asked(
                where,
                f"{split}/{number}",
                question,
                most_frequent(answers),
                answers=answers,
                kind=intern("" if kind is None else str(kind)),
            )
        )
    return ListedDialogues(tuple(dialogues), HubPictures(images, config.image_column, f"{split}/"))


def _require_columns(config: HubVqaSource, there: list[str]) -> None:
    for key in ("image_column", "question_column", "answer_column", "kind_column"):
        column = getattr(config, key)
        if column is not None and column not in there:
            columns = some(sorted(there), 12)
            raise DataError(
                f"data.source.{key}={column!r}: {config.path} has no such column; there are {columns}"
            )


def answers_from(value: Any, where: str) -> tuple[str, ...]:
    """An answer, a list of answers, a list of {answer: …} or {answer: [list]} as a tuple without blanks; raises DataError.

    `answers_from([{"answer": "red"}, {"answer": " dark red"}], "row 3") == ("red", "dark red")`
    """
    if isinstance(value, dict):  # how `datasets` hands out a list of structs
        value = value.get("answer")
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, list):
        listed = [entry.get("answer") if isinstance(entry, dict) else entry for entry in listed]
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        wanted = "a string, a list of strings, or a list of {answer: …}"
        raise DataError(f"{where}: the answer must be {wanted}, not {value!r}"[:300])
    answers = tuple(intern(stripped) for text in listed if (stripped := text.strip()))
    if not answers:
        raise DataError(f"{where}: the question has no answer")
    return answers


def most_frequent(answers: tuple[str, ...]) -> str:
    """The answer that was given most often, the first of those where there are several."""
    return Counter(answers).most_common(1)[0][0]
