"""Small made-up data sets of questions about pictures, in the layouts that the sources read, on real 16×16 drawings.

Each writer returns the keys of `data.source`, for `DialogueDataConfig.model_validate({"source": …})` or a configuration file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from tests.pictures import COLORS, SHAPES, draw, write_shapes

KINDS = tuple((color, shape) for shape in SHAPES for color in COLORS)


def _kind(number: int, split: str) -> tuple[str, str]:
    return KINDS[(number + (7 if split == "test" else 0)) % len(KINDS)]


def write_pictures(folder: Path, split: str, names: list[str]) -> None:
    """Picture i is of `KINDS[i]` (from another i on for the test split)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        draw(*_kind(number, split), seed=number + (500 if split == "test" else 0)).save(folder / name)


def write_vqa_v2(folder: Path, train: int = 8, test: int = 4) -> dict[str, Any]:
    """Three questions to each picture: the color (all ten agree), the shape (six do), whether it is red (eight do)."""
    source: dict[str, Any] = {
        "kind": "vqa_v2",
        "file_name": "COCO_{split}2014_{image_id:012d}.png",
    }
    for split, count in (("train", train), ("test", test)):
        official = "train" if split == "train" else "val"
        images = [100 + number for number in range(count)]
        write_pictures(
            folder / official, split, [f"COCO_{official}2014_{image:012d}.png" for image in images]
        )
        questions, annotations = [], []
        for number, image in enumerate(images):
            color, shape = _kind(number, split)
            red = "yes" if color == "red" else "no"
            for place, (question, answer, agree, kind) in enumerate(
                [
                    ("What color is it?", color, 10, "other"),
                    ("What is the shape?", shape, 6, "other"),
                    ("Is it red?", red, 8, "yes/no"),
                ]
            ):
                number_of_it = 1000 * image + place
                said = [answer] * agree + ["unsure"] * (10 - agree)
                questions.append({"image_id": image, "question": question, "question_id": number_of_it})
                annotations.append(
                    {
                        "question_type": " ".join(question.lower().split()[:2]),
                        "multiple_choice_answer": answer,
                        "answers": [
                            {"answer": text, "answer_confidence": "yes", "answer_id": i}
                            for i, text in enumerate(said, start=1)
                        ],
                        "image_id": image,
                        "answer_type": kind,
                        "question_id": number_of_it,
                    }
                )
        for what, rows in (("questions", questions), ("annotations", annotations)):
            path = folder / f"{official}_{what}.json"
            path.write_text(json.dumps({"data_type": "mscoco", what: rows}), encoding="utf-8")
            source[f"{split}_{what}"] = str(path)
        source[f"{split}_images"] = str(folder / official)
    return source


def write_llava(folder: Path, train: int = 8, test: int = 4) -> dict[str, Any]:
    """Conversations of two turns about a picture, and as the last entry one without a picture."""
    source: dict[str, Any] = {"kind": "llava", "images": str(folder / "images")}
    for split, count in (("train", train), ("test", test)):
        names = [f"{number}.png" for number in range(count)]
        write_pictures(folder / "images" / split, split, names)
        entries: list[dict[str, Any]] = []
        for number, name in enumerate(names):
            color, shape = _kind(number, split)
            said = ["<image>\nWhat is it?", f"It is a {shape}.", "What color is it?", f"It is {color}."]
            entries.append(
                {
                    "id": f"{split}-{number}",
                    "image": f"{split}/{name}",
                    "conversations": conversation(*said),
                }
            )
        entries.append({"id": f"{split}-text", "conversations": conversation("Say black.", "black")})
        path = folder / f"{split}.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        source[f"{split}_file"] = str(path)
    return source


def conversation(*said: str) -> list[dict[str, str]]:
    """What human and gpt say in turn, as LLaVA writes it."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(said)]


def write_hub_vqa(folder: Path, train: int = 8, test: int = 4) -> dict[str, Any]:
    """A folder written by `datasets` with the columns image, question, answers and kind; splits train and validation."""
    splits = {}
    for split, count in (("train", train), ("validation", test)):
        kinds = [_kind(number, "train" if split == "train" else "test") for number in range(count)]
        splits[split] = datasets.Dataset.from_dict(
            {
                "image": [draw(*kind, seed=number) for number, kind in enumerate(kinds)],
                "question": ["what color is it?"] * count,
                "answers": [["unsure", color, color] for color, _ in kinds],
                "kind": [shape for _, shape in kinds],
            },
            features=datasets.Features(
                {
                    "image": datasets.Image(),
                    "question": datasets.Value("string"),
                    "answers": datasets.Sequence(datasets.Value("string")),
                    "kind": datasets.Value("string"),
                }
            ),
        )
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return {"kind": "hub_vqa", "path": str(folder), "kind_column": "kind"}


def write_captions(folder: Path) -> dict[str, Any]:
    """Captions such as "red circle" for three pictures of each in train, one in test."""
    write_shapes(folder)
    return {"kind": "captions", "pairs": {"kind": "folder", "path": str(folder), "template": "{}"}}


def write_labels(folder: Path) -> dict[str, Any]:
    """The same pictures with templated questions."""
    return {**write_captions(folder), "kind": "labels"}
