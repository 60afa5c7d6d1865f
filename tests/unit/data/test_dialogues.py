"""Every kind of dialogue source on real files: what it reads, and what it says when the data is wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmray.config.dialogues import DialogueDataConfig, DialogueSourceConfig, EasyVqaSource
from fmray.config.schema import ImageConfig
from fmray.data.dialogues import DialogueSource, open_dialogues, speaks_of_sides
from fmray.data.dialogues_hub import answers_from
from fmray.data.sources import Split
from fmray.data.transforms import decode_rgba
from fmray.errors import ConfigError, DataError
from fmray.types import Dialogue, Turn
from tests.dialogues_data import (
    conversation,
    write_captions,
    write_hub_vqa,
    write_labels,
    write_llava,
    write_vqa_v2,
)

WRITERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "vqa_v2": write_vqa_v2,
    "llava": write_llava,
    "hub_vqa": write_hub_vqa,
    "captions": write_captions,
    "labels": write_labels,
}


def config(keys: dict[str, Any], **changes: Any) -> DialogueSourceConfig:
    return DialogueDataConfig.model_validate({"source": {**keys, **changes}}).source


def opened(keys: dict[str, Any], split: Split = "train", **changes: Any) -> list[Dialogue]:
    source = open_dialogues(config(keys, **changes), split)
    return [source[index] for index in range(len(source))]


def refused(
    keys: dict[str, Any], *said: str, split: Split = "train", error: Any = DataError, **changes: Any
) -> None:
    with pytest.raises(error) as caught:
        open_dialogues(config(keys, **changes), split)
    assert "\n" not in str(caught.value)
    for part in said:
        assert part in str(caught.value)


def check_pictures(source: DialogueSource) -> None:
    """Every picture can be decoded, from a pickled copy as well."""
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source)
    for index in range(len(source)):
        assert copy[index] == source[index]
        for key in source[index].pictures:
            assert copy.picture(key) == source.picture(key)
            assert decode_rgba(source.picture(key), ImageConfig(size=16), name=key).shape == (4, 16, 16)


@pytest.mark.parametrize("kind", WRITERS)
def test_pictures_are_read_by_key_and_told_apart_by_split(kind: str, tmp_path: Path) -> None:
    keys = WRITERS[kind](tmp_path / "data")
    found: dict[str, set[str]] = {}
    for split in ("train", "test"):
        source = open_dialogues(config(keys), split)
        check_pictures(source)
        with pytest.raises(IndexError):
            source[len(source)]
        found[split] = {key for index in range(len(source)) for key in source[index].pictures}
        for index in range(len(source)):
            dialogue = source[index]
            assert sum(turn.pictures for turn in dialogue.turns) == len(dialogue.pictures)
    assert found["train"]
    assert found["test"]
    assert not found["train"] & found["test"]


@pytest.mark.parametrize("kind", ["vqa_v2", "llava", "captions"])
def test_opening_reads_no_picture_and_a_missing_one_is_named(kind: str, tmp_path: Path) -> None:
    keys = WRITERS[kind](tmp_path / "data")
    for picture in tmp_path.rglob("*.png"):
        picture.write_bytes(b"")  # listings see the files, whoever reads one gets nothing
    source = open_dialogues(config(keys), "test")
    key = source[0].pictures[0]
    assert source.picture(key) == b""
    for picture in tmp_path.rglob("*.png"):
        picture.unlink()
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)") as caught:
        source.picture(key)
    assert key.rpartition("/")[2].split(".")[0] in str(caught.value)


# ------------------------------------------------------------------------------------------------------ left and right


@pytest.mark.parametrize(
    "text",
    [
        "Is it on the LEFT?",
        "the rightmost one",
        "left-hand side",
        "turn anti-clockwise",
        "counterclockwise",
        "to the right.",
        "왼쪽에 무엇이 있나요?",
        "오른쪽",
        "우측 상단",
        "시계 방향으로",
    ],
)
def test_sides_are_found_in_questions_and_answers(text: str) -> None:
    assert speaks_of_sides([Turn(("", text), "red")])
    assert speaks_of_sides([Turn((text, ""), "red")])
    assert speaks_of_sides([Turn(("", "where?"), "there"), Turn(("and?",), text)])
    assert speaks_of_sides([Turn(("", "where?"), "there")], ("there", text))


@pytest.mark.parametrize(
    "text", ["bright", "upright", "the leftovers", "copyright", "a clock", "외로운 왼", ""]
)
def test_words_that_only_contain_them_are_none(text: str) -> None:
    assert not speaks_of_sides([Turn(("", text), text)], (text,))


# ------------------------------------------------------------------------------------------------------------ easy-VQA


@pytest.mark.assets
def test_easy_vqa() -> None:
    train, test = (open_dialogues(EasyVqaSource(), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (38_575, 9_673)
    first = test[0]
    assert first == Dialogue(
        "easy_vqa[test]#0", ("test/images/0.png",), (Turn(("", "what is the red shape?"), "triangle"),),
        kind="shape",
    )  # fmt: skip
    everything = [source[index] for source in (train, test) for index in range(len(source))]
    assert len({dialogue.turns[0].answer for dialogue in everything}) == 13
    by_kind: dict[str, set[str]] = {}
    for dialogue in everything:
        by_kind.setdefault(dialogue.kind, set()).add(dialogue.turns[0].answer)
    assert by_kind["yes/no"] == {"yes", "no"}
    assert by_kind["shape"] == {"circle", "rectangle", "triangle"}
    assert len(by_kind["color"]) == 8
    assert len(by_kind) == 3
    assert not any(dialogue.sided for dialogue in everything)
    assert decode_rgba(train.picture("train/images/3999.png"), ImageConfig(size=64), name="").shape[1:] == (
        64,
        64,
    )
    assert train.picture("train/images/0.png") != test.picture("test/images/0.png")
    assert pickle.loads(pickle.dumps(test))[17] == test[17]


# -------------------------------------------------------------------------------------------------------------- VQA v2


def test_vqa_v2_question_and_ten_answers(tmp_path: Path) -> None:
    dialogues = opened(write_vqa_v2(tmp_path), "test")
    assert len(dialogues) == 12
    assert dialogues[1] == Dialogue(
        "100001",
        ("test/COCO_val2014_000000000100.png",),
        (Turn(("", "What is the shape?"), dialogues[1].turns[0].answer),),
        (dialogues[1].turns[0].answer,) * 6 + ("unsure",) * 4,
        kind="other",
    )
    assert {dialogue.kind for dialogue in dialogues} == {"other", "yes/no"}


@pytest.mark.parametrize(("consensus", "left"), [(0.0, 24), (0.6, 24), (0.7, 16), (0.8, 16), (1.0, 8)])
def test_consensus_cuts_the_training_split_alone(consensus: float, left: int, tmp_path: Path) -> None:
    keys = write_vqa_v2(tmp_path)
    assert len(opened(keys, "train", consensus=consensus)) == left
    assert len(opened(keys, "test", consensus=consensus)) == 12


def test_no_question_left(tmp_path: Path) -> None:
    keys = write_vqa_v2(tmp_path)
    rows = json.loads(Path(keys["train_annotations"]).read_text())
    for row in rows["annotations"]:
        row["answers"][0]["answer"] = "odd one out"
    Path(keys["train_annotations"]).write_text(json.dumps(rows))
    refused(keys, "data.source.consensus=1.0: none of the 24 questions in", consensus=1.0)


@pytest.mark.parametrize("what", ["train_questions", "train_annotations", "test_questions"])
def test_vqa_v2_files_that_are_not_there_or_no_json(what: str, tmp_path: Path) -> None:
    keys = write_vqa_v2(tmp_path)
    split: Split = "train" if what.startswith("train") else "test"
    Path(keys[what]).write_text("{")
    refused(keys, f"data.source.{what}='{keys[what]}': is not JSON", split=split)
    Path(keys[what]).unlink()
    refused(keys, f"data.source.{what}='{keys[what]}': cannot be read (No such file", split=split)


def test_vqa_v2_wrong_contents(tmp_path: Path) -> None:
    keys = write_vqa_v2(tmp_path)
    path = Path(keys["train_annotations"])
    rows = json.loads(path.read_text())
    path.write_text(json.dumps({"annotations": rows["annotations"][:-1]}))
    refused(keys, f"data.source.train_annotations='{path}': has no annotation of question 107002")
    rows["annotations"][4]["answers"] = "red"
    path.write_text(json.dumps(rows))
    refused(keys, "annotation of question 101001: 'answers' must be a list, not str")
    path.write_text(json.dumps(rows["annotations"]))
    refused(keys, "data.source.train_annotations=", "must be an object with keys, not list")
    path.write_text(json.dumps({"annotation": []}))
    refused(keys, "has no key 'annotations'; there are annotation")
    refused(
        keys, "data.source.train_images='/nowhere/at/all': no such folder", train_images="/nowhere/at/all"
    )


def test_vqa_v2_name_of_files(tmp_path: Path) -> None:
    keys = write_vqa_v2(tmp_path)
    refused(
        keys, "data.source.file_name='{number}.jpg'", "image 100", error=ConfigError, file_name="{number}.jpg"
    )
    assert opened(keys, file_name="{image_id}.jpg")[0].pictures == ("train/100.jpg",)


# -------------------------------------------------------------------------------------------------------------- LLaVA


def llava(tmp_path: Path, *entries: Any) -> dict[str, Any]:
    keys = write_llava(tmp_path)
    Path(keys["train_file"]).write_text(json.dumps(list(entries)))
    return keys


def test_llava_turns_and_text_alone(tmp_path: Path) -> None:
    dialogues = opened(write_llava(tmp_path), "test")
    assert dialogues[0].name == "test-0"
    assert dialogues[0].pictures == ("test/0.png",)
    first, second = dialogues[0].turns
    assert first.question == ("", "What is it?")
    assert second.question == ("What color is it?",)
    assert dialogues[-1] == Dialogue("test-text", (), (Turn(("Say black.",), "black"),))


def test_llava_marks_split_the_text(tmp_path: Path) -> None:
    said = ["Compare <image> with <image>\nplease", "same", "And <image>?", "on the left"]
    several = {"id": 3, "image": ["a.png", "b.png", "a.png"], "conversations": conversation(*said)}
    unmarked = {"image": "a.png", "conversations": conversation("what is it?", "a bar", "sure?", "yes")}
    first, second = opened(llava(tmp_path, several, unmarked))
    assert (first.name, second.name) == ("3", "#1")
    assert first.turns[0].question == ("Compare", "with", "please")
    assert first.turns[1].question == ("And", "?")
    assert first.pictures == ("a.png", "b.png", "a.png")
    assert first.sided
    assert second.turns[0].question == ("", "what is it?")
    assert second.turns[1].question == ("sure?",)
    assert not second.sided


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"id": "x", "image": "a.png", "conversations": conversation("<image> <image>", "b")},
         "entry x: its texts have 2 <image> marks, and it has 1 pictures"),
        ({"id": "x", "image": ["a.png", "b.png"], "conversations": conversation("both", "b")},
         "entry x: its texts have 0 <image> marks, and it has 2 pictures"),
        ({"id": "x", "conversations": conversation("<image> what?", "b")},
         "entry x: its texts have 1 <image> marks, and it has 0 pictures"),
        ({"conversations": conversation("a", "b", "c")},
         "entry #0: human and gpt must speak in turn, human first and gpt last; here human, gpt, human"),
        ({"conversations": list(reversed(conversation("a", "b")))}, "here gpt, human"),
        ({"conversations": []}, "here nobody"),
        ({"id": "x", "conversations": [{"from": "human"}]}, "entry x: has no key 'value'; there are from"),
        ({"id": "x", "image": 3, "conversations": conversation("a", "b")},
         "entry x: 'image' must be a file's name or a list of them, not 3"),
        ({"id": "x"}, "entry x: has no key 'conversations'"),
        ("text", "entry #0: must be an object with keys, not str"),
    ],
)  # fmt: skip
def test_llava_entries_that_are_wrong(entry: Any, said: str, tmp_path: Path) -> None:
    refused(llava(tmp_path, entry), said)


def test_llava_without_entries(tmp_path: Path) -> None:
    refused(llava(tmp_path), "data.source.train_file=", "must be a list of one or more entries")


# ---------------------------------------------------------------------------------------------------------------- hub


def test_hub_rows(tmp_path: Path) -> None:
    keys = write_hub_vqa(tmp_path / "data")
    row = opened(keys, "test")[1]
    assert row.name == f"{keys['path']}[validation]#1"
    assert row.pictures == ("test/1",)
    assert row.turns[0].question == ("", "what color is it?")
    assert row.answers == ("unsure", row.turns[0].answer, row.turns[0].answer)
    assert row.kind == "square"
    assert len(opened(keys, "test", test_split="train[:50%]")) == 4
    said = f"data.source.answer_column='answer': {keys['path']} has no such column; there are answers, image"
    refused(keys, said, answer_column="answer")
    refused(keys, "data.source.path=", "split 'dev' cannot be loaded", split="test", test_split="dev")


def test_answers_in_all_their_shapes() -> None:
    assert answers_from(" red ", "row") == ("red",)
    assert answers_from(["red", "", "blue"], "row") == ("red", "blue")
    assert answers_from([{"answer": "red", "id": 1}, {"answer": "blue"}], "row") == ("red", "blue")
    assert answers_from({"answer": ["red", "blue"], "id": [1, 2]}, "row") == ("red", "blue")
    for value in (None, 3, ["red", None], [{"text": "red"}]):
        with pytest.raises(DataError, match="row: the answer must be a string, a list of strings"):
            answers_from(value, "row")
    for value in ("", [], [" "]):
        with pytest.raises(DataError, match="row: the question has no answer"):
            answers_from(value, "row")
