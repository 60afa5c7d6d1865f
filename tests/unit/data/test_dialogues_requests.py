"""Requests for pictures and requests for words: splits that share neither templates nor captions, answers that are true."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fmray.config.answers import AnswersConfig
from fmray.config.data import EmojiSource
from fmray.config.dialogues import DialogueDataConfig, RequestSource
from fmray.config.loading import validate
from fmray.data.dialogues import open_dialogues
from fmray.data.dialogues_requests import TEMPLATES, WORD_KINDS, noun_phrases
from fmray.data.emoji import open_emoji
from fmray.data.reviews import folded
from fmray.data.sources import Split
from fmray.errors import ConfigError, DataError
from fmray.types import Dialogue
from tests.pictures import draw

TRAIN = (["red circle", "a red dot"], ["blue bar"], ["green square", "Black Bar"], ["yellow triangle"])
TEST = (["black bar", "soot"], ["red square"])


def shapes(folder: Path, train: Any = TRAIN, test: Any = TEST) -> dict[str, Any]:
    for split, captions in (("train", train), ("test", test)):
        lines = []
        for i, known in enumerate(captions):
            draw(known[0].split()[0], known[0].split()[1], i).save(folder / f"{split}{i}.png")
            lines.append(json.dumps({"image": f"{split}{i}.png", "caption": known}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"kind": "requests", "pairs": {"kind": "jsonl", "path": str(folder)}}


def listed(keys: dict[str, Any], split: Split) -> list[Dialogue]:
    source = open_dialogues(DialogueDataConfig.model_validate({"source": keys}).source, split)
    return [source[index] for index in range(len(source))]


def test_templates_of_the_splits_differ_and_have_their_places() -> None:
    for kind, by_split in TEMPLATES.items():
        assert not set(map(folded, by_split["train"])) & set(map(folded, by_split["test"])), kind
        for template in (*by_split["train"], *by_split["test"]):
            assert template.count("{}") == (kind not in ("again", "look")), template
            assert template.count("[]") == (kind == "translation"), template
    # no word gives a request for a picture away
    asked = {word for split in ("train", "test") for t in TEMPLATES["picture"][split] for word in t.split()}
    told = {word for kind in WORD_KINDS for t in TEMPLATES[kind]["train"] for word in t.split()}
    assert {"draw", "picture", "show", "see", "do", "not"} <= asked & told


def test_each_picture_brings_requests_of_both_sides(tmp_path: Path) -> None:
    keys = shapes(tmp_path)
    train, test = listed(keys, "train"), listed(keys, "test")
    # "Black Bar" is a caption of the test split: five captions are left
    assert Counter(d.kind for d in train)["picture"] == 5
    assert sum(Counter(d.kind for d in train)[kind] for kind in WORD_KINDS) == 5
    assert Counter(d.kind for d in train)["again"] == Counter(d.kind for d in train)["look"] == 4
    assert Counter(d.kind for d in test)["picture"] == 2
    assert sum(Counter(d.kind for d in test)[kind] for kind in WORD_KINDS) == 2
    assert len({dialogue.name for dialogue in train}) == len(train)
    for dialogue in (*train, *test):
        turn = dialogue.turns[-1]
        assert (dialogue.kind in ("picture", "again")) == bool(turn.picture) == (not turn.answer)
        assert bool(dialogue.reply) == bool(turn.picture)
        assert len(dialogue.pictures) == turn.pictures == (dialogue.kind in ("again", "look"))
        assert "translation" not in dialogue.kind
    again = next(d for d in test if d.kind == "again")
    source = open_dialogues(DialogueDataConfig.model_validate({"source": keys}).source, "test")
    assert again.reply == "test/0"
    assert source.picture(again.reply) == (tmp_path / "test0.png").read_bytes()


def test_no_test_caption_is_asked_for_in_training(tmp_path: Path) -> None:
    for dialogue in listed(shapes(tmp_path), "train"):
        turn = dialogue.turns[-1]
        said = folded(" ".join([*turn.question, turn.answer, turn.picture]))
        assert not any(folded(caption) in said for captions in TEST for caption in captions), dialogue


def test_answers_are_true(tmp_path: Path) -> None:
    train = [["redpoint x"], *([f"blue bar{i}"] for i in range(24)), ["green"]]
    keys = shapes(tmp_path, train=[[f"red bar {c[0]}", c[0]] for c in train])
    seen = set()
    for dialogue in listed(keys, "train"):
        caption = next((c for c in ("redpoint x", "green") if dialogue.question.find(c) >= 0), None)
        if dialogue.kind == "letter":
            seen.add("letter")
            assert dialogue.turns[0].answer in ("R", "B", "G")
        if dialogue.kind == "several" and caption and "red bar" not in dialogue.question:
            seen.add("several")
            assert dialogue.turns[0].answer == ("yes" if " " in caption else "no")
        if dialogue.kind == "name":
            seen.add("name")
            assert dialogue.turns[0].answer in dialogue.question
    assert {"letter", "name"} <= seen


def test_splits_of_the_same_captions_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        listed(shapes(tmp_path, train=TEST), "train")
    assert str(error.value) == (
        "data.source.pairs: every training caption is one of the test split's; take a split by what is shown: "
        "the test split's captions are never asked for in training"
    )


def test_a_model_of_words_is_refused_before_it_learns() -> None:
    with pytest.raises(ConfigError) as error:
        validate(AnswersConfig, {"data": {"source": {"kind": "requests"}}})
    assert str(error.value) == (
        "data.source.kind='requests': asks for pictures: set model.kind=mllm and model.output.clip"
    )


@pytest.mark.assets
def test_emoji_are_split_by_concept_and_named_in_other_languages() -> None:
    config = RequestSource(languages=("de", "ko"))
    train, test = open_dialogues(config, "train"), open_dialogues(config, "test")
    held_out = {folded(captions[0]) for _, captions in open_emoji(EmojiSource(), "test").samples}
    for index in range(len(train)):
        turn = train[index].turns[-1]
        assert folded(turn.picture) not in held_out
    german = [
        d
        for d in map(test.__getitem__, range(len(test)))
        if d.question == "how do you say octopus in German?"
    ]
    told = {d.question: d.turns[0].answer for d in map(test.__getitem__, range(len(test)))}
    assert all(d.turns[0].answer == "tintenfisch" for d in german)
    assert any("Korean" in question for question in told)
    assert len({test[index].reply for index in range(len(test))} - {""}) == 330


@pytest.mark.slow
@pytest.mark.assets
def test_noun_phrases_of_the_reviews() -> None:
    found = noun_phrases(2000, {"film", "cat"})
    assert len(set(found)) == 2000
    assert not {"film", "cat"} & set(found)
    assert {"kitchen", "shadow", "accent"} <= set(found)
