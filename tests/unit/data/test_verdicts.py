"""Verdicts from JSON lines, from the hub and from reviews; every mistake named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from fmray.config.loading import validate
from fmray.config.reward import RewardDataConfig
from fmray.data.reviews import load_reviews
from fmray.data.verdicts import Verdict, joined, open_verdicts, reference_texts, spread
from fmray.errors import ConfigError, DataError


def lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def folder_of(tmp_path: Path, train: list[Any], test: list[Any] | None = None) -> Path:
    lines(tmp_path / "train.jsonl", train)
    lines(tmp_path / "test.jsonl", train if test is None else test)
    return tmp_path


def jsonl(path: Path, kind: str, **keys: Any) -> RewardDataConfig:
    columns = keys.pop("columns", {})
    source = {"kind": "jsonl", "path": str(path), "columns": columns}
    return validate(RewardDataConfig, {"kind": kind, "source": source, **keys})


def test_labelled_texts_with_labels_as_the_data_have_them(tmp_path: Path) -> None:
    rows = [{"text": "fine", "label": "good"}, {"text": "dull", "label": "bad"}]
    lines(tmp_path / "train.jsonl", rows)
    lines(tmp_path / "test_short.jsonl", rows[:1])
    lines(tmp_path / "test_long.jsonl", rows[1:])
    found = open_verdicts(jsonl(tmp_path, "labelled"))
    assert found.labels == ("bad", "good")
    assert found.train == (Verdict(("fine",), label=1), Verdict(("dull",), label=0))
    assert found.held_out == {"test_long": (found.train[1],), "test_short": (found.train[0],)}


def test_labels_by_number_take_the_names_that_are_given(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 10}, {"text": "b", "label": 2}, {"text": "c", "label": 2}]
    numbered = open_verdicts(jsonl(folder_of(tmp_path, rows), "labelled"))
    assert numbered.labels == ("2", "10")  # as numbers, not as texts
    assert [verdict.label for verdict in numbered.train] == [1, 0, 0]
    named = [{"text": "a", "label": 1}, {"text": "b", "label": "no"}, {"text": "c", "label": False}]
    found = open_verdicts(jsonl(folder_of(tmp_path, named), "labelled", labels=("no", "yes")))
    assert [verdict.label for verdict in found.train] == [1, 0, 0]


def test_pairs_and_rankings_put_prompt_and_answer_together(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"prompt": "2 + 2", "chosen": "is 4", "rejected": "", "margin": 0.5},
        {"prompt": "Hi\n", "chosen": "Hello", "rejected": ", what?"},
        {"chosen": "good", "rejected": "bad"},
    ]
    found = open_verdicts(jsonl(folder_of(tmp_path, rows), "pairs"))
    assert found.labels == ()
    assert found.train == (
        Verdict(("2 + 2 is 4", "2 + 2"), margin=0.5),
        Verdict(("Hi\nHello", "Hi\n, what?")),
        Verdict(("good", "bad")),
    )
    ranked = [{"question": "Who", "best_to_worst": ["me", "you", "they"]}]
    columns = {"prompt": "question", "answers": "best_to_worst"}
    found = open_verdicts(jsonl(folder_of(tmp_path, ranked), "rankings", columns=columns))
    assert found.train == (Verdict(("Who me", "Who you", "Who they")),)


def test_text_is_joined_as_it_is_written() -> None:
    assert joined("The film", "is good") == "The film is good"
    assert joined("The film", ", is") == "The film, is"
    assert joined("The film ", "is") == joined("The film", " is") == "The film is"
    assert joined("", "is") == "is"


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("labelled", {"text": " ", "label": 1}, "'text' must be a text, and is blank"),
        ("labelled", {"text": 3, "label": 1}, "'text' must be a text, and is a int"),
        ("labelled", {"sentence": "a", "label": 1}, "no key 'text'; there are label, sentence"),
        ("labelled", {"text": "a", "label": 0.5}, "a whole number, not 0.5"),
        ("pairs", {"prompt": "a", "chosen": "b"}, "no key 'rejected'"),
        ("pairs", {"chosen": "b", "rejected": ""}, "'rejected' must be a text, and is blank"),
        ("pairs", {"chosen": "b", "rejected": "c", "margin": "big"}, "'margin' must be a number"),
        ("rankings", {"prompt": "a", "answers": ["b"]}, "two or more texts, the best first"),
        ("rankings", {"prompt": "a", "answers": ["b", 3]}, "two or more texts, the best first"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, kind: str, row: Any, said: str) -> None:
    good: list[Any] = {
        "labelled": [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
        "pairs": [{"chosen": "a", "rejected": "b"}],
        "rankings": [{"answers": ["a", "b"]}],
    }[kind]
    with pytest.raises(DataError, match=r"train.jsonl:2") as caught:
        open_verdicts(jsonl(folder_of(tmp_path, [good[0], row], good), kind))
    assert said in str(caught.value)


def test_an_unknown_label_and_a_single_one_are_errors(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}]
    with pytest.raises(DataError, match="nothing to learn"):
        open_verdicts(jsonl(folder_of(tmp_path, rows), "labelled"))
    with pytest.raises(DataError, match="none of y, z"):
        open_verdicts(jsonl(tmp_path, "labelled", labels=("y", "z")))


def test_missing_files_and_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_verdicts(jsonl(tmp_path / "nowhere", "pairs"))
    lines(tmp_path / "train.jsonl", [{"chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"no test\*.jsonl"):
        open_verdicts(jsonl(tmp_path, "pairs"))
    lines(tmp_path / "test.jsonl", [])
    with pytest.raises(DataError, match="is empty"):
        open_verdicts(jsonl(tmp_path, "pairs"))
    with pytest.raises(ConfigError, match="unknown; there are: text"):
        jsonl(tmp_path, "pairs", columns={"winner": "chosen"})


def test_a_saved_dataset_with_named_labels_and_two_held_out_splits(tmp_path: Path) -> None:
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["sad", "glad"])}
    )
    rows = {"sentence": ["a", "b", "c"], "label": [1, 0, 1]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": whole, "validation": whole, "test": whole}).save_to_disk(str(tmp_path))
    source = {
        "kind": "hub",
        "path": str(tmp_path),
        "columns": {"text": "sentence"},
        "test_splits": ["validation", "test[:1]"],
    }
    found = open_verdicts(validate(RewardDataConfig, {"source": source}))
    assert found.labels == ("sad", "glad")
    assert [verdict.label for verdict in found.train] == [1, 0, 1]
    assert {name: len(rows) for name, rows in found.held_out.items()} == {"validation": 3, "test_1": 1}


def test_spread_takes_items_from_everywhere() -> None:
    assert spread(tuple(range(10)), 4) == (0, 2, 5, 7)
    assert spread((1, 2), 5) == spread((1, 2), None) == (1, 2)


def test_reference_texts_are_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    lines(path, [{"text": "a"}, {"text": "b"}])
    assert reference_texts(str(path)) == ["a", "b"]
    lines(path, [{"text": "a"}, {"words": "b"}])
    with pytest.raises(DataError, match=r"texts.jsonl:2"):
        reference_texts(str(path))


@pytest.mark.assets
def test_reviews_whole_continued_and_their_last_words() -> None:
    source = {"imdb": 500, "continuations": True, "imdb_words": [10, 30], "opening_words": [4, 8]}
    found = open_verdicts(validate(RewardDataConfig, {"source": source}))
    whole = [verdict.texts[0] for verdict in found.train[:7512]]
    assert whole == [review.text for review in load_reviews("train", "rotten_tomatoes")]
    assert found.labels == ("negative", "positive")
    pieces = [verdict.texts[0] for verdict in found.train[-500:]]
    assert all(len(piece.split()) <= 30 for piece in pieces)
    assert sum(verdict.label for verdict in found.train[-500:]) == pytest.approx(250, abs=30)
    continued = {verdict.texts[0] for verdict in found.train[7512:-500]}
    assert 6000 < len(continued) <= 7512
    assert all(any(text.endswith(rest) for text in whole) for rest in list(continued)[:20])
    assert len(found.held_out["rotten_tomatoes"]) == 1016
    trained_on = {verdict.texts[0] for verdict in found.train}
    for name in ("rotten_tomatoes", "imdb"):
        assert not trained_on & {verdict.texts[0] for verdict in found.held_out[name]}
