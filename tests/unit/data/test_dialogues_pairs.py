"""Dialogues made of captions and labels: from every storage of pairs, drawn by name, with no picture read."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmray.config.dialogues import DialogueDataConfig
from fmray.data.dialogues import DialogueSource, open_dialogues
from fmray.data.sources import Split
from fmray.errors import ConfigError, DataError
from fmray.types import Dialogue
from tests.dialogues_data import write_captions, write_labels
from tests.pictures import draw


def opened(keys: dict[str, Any], split: Split = "train", **changes: Any) -> DialogueSource:
    data = DialogueDataConfig.model_validate({"source": {**keys, **changes}})
    return open_dialogues(data.source, split)


def listed(keys: dict[str, Any], split: Split = "train", **changes: Any) -> list[Dialogue]:
    source = opened(keys, split, **changes)
    return [source[index] for index in range(len(source))]


CAPTIONS = (["a red bar", "red"], ["a blue bar"], ["a green bar", "green", "on the left"])
BROKEN = b"no picture at all"


def jsonl(folder: Path) -> dict[str, Any]:
    for i, captions in enumerate(CAPTIONS):
        (folder / f"{i}.png").write_bytes(BROKEN)
        for split in ("train", "test"):
            with (folder / f"{split}.jsonl").open("a") as lines:
                lines.write(json.dumps({"image": f"{i}.png", "caption": captions}) + "\n")
    return {"kind": "jsonl", "path": str(folder)}


def parquet(folder: Path) -> dict[str, Any]:
    table = pa.table({"image": [BROKEN] * 3, "caption": list(CAPTIONS)})
    for split in ("train", "test"):
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=2)
    return {"kind": "parquet", "path": str(folder)}


def webdataset(folder: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}.tar", "w") as archive:
            for i, captions in enumerate(CAPTIONS):
                for suffix, content in (
                    ("png", BROKEN),
                    ("json", json.dumps({"caption": captions}).encode()),
                ):
                    member = tarfile.TarInfo(f"{i}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return {"kind": "webdataset", "path": str(folder), "caption_key": "caption"}


def hub(folder: Path) -> dict[str, Any]:
    rows = datasets.Dataset.from_dict({"image": [BROKEN] * 3, "caption": list(CAPTIONS)})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder / "saved"))
    columns = {"image_column": "image", "caption_column": "caption"}
    return {"kind": "hub", "path": str(folder / "saved"), **columns, "test_split": "test"}


@pytest.mark.parametrize("write", [jsonl, parquet, webdataset, hub])
def test_captions_from_every_storage_of_pairs(write: Any, tmp_path: Path) -> None:
    keys = {"kind": "captions", "pairs": write(tmp_path)}
    train, test = listed(keys), listed(keys, "test")
    assert [d.turns[0].answer for d in train] == [caption for each in CAPTIONS for caption in each]
    assert [d.turns[0].answer for d in test] == [each[0] for each in CAPTIONS]
    assert [d.pictures for d in train] == [(f"train/{i}",) for i in (0, 0, 1, 2, 2, 2)]
    assert all(d.turns[0].question == ("", "") for d in train)
    assert [d.sided for d in train] == [False] * 5 + [True]
    assert opened(keys).picture("train/2") == BROKEN
    assert len({d.name for d in train}) == 6


def test_prompts_are_drawn_by_name(tmp_path: Path) -> None:
    prompts = ["describe it", "what is it?", ""]
    keys = write_captions(tmp_path)
    first = {d.name: d.turns[0].question for d in listed(keys, prompts=prompts)}
    assert first == {d.name: d.turns[0].question for d in listed(keys, prompts=prompts)}
    asked = Counter(question[1] for question in first.values())
    assert set(asked) == set(prompts)
    assert min(asked.values()) > 10
    (tmp_path / "train" / "red_bar" / "0.png").unlink()  # what is left keeps its prompts
    fewer = {d.name: d.turns[0].question for d in listed(keys, prompts=prompts)}
    assert len(fewer) == len(first) - 1
    assert fewer.items() <= first.items()
    with pytest.raises(ConfigError, match=r"data.source.prompts=\[\]: give at least one"):
        opened(keys, prompts=[])


def test_labels_ask_what_and_whether(tmp_path: Path) -> None:
    dialogues = listed(write_labels(tmp_path))
    what, whether = dialogues[::2], dialogues[1::2]
    assert len(what) == len(whether) == 60
    assert {d.kind for d in what} == {"templated what"}
    assert {d.kind for d in whether} == {"templated yes/no"}
    assert len({d.name for d in dialogues}) == 120
    for asks, says in zip(what, whether, strict=True):
        assert asks.pictures == says.pictures
        label = asks.turns[0].answer
        assert says.turns[0].answer == ("yes" if f" {label}?" in says.question else "no")
    answers = Counter(d.turns[0].answer for d in whether)
    assert 20 < answers["yes"] < 40  # a fair coin fails this one time in a hundred; the draw is fixed
    assert len({d.question for d in what}) == 2
    assert dialogues == listed(write_labels(tmp_path))


def test_label_templates_and_labels_that_cannot_be_used(tmp_path: Path) -> None:
    keys = write_labels(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"data.source.whether='is it\?': write \{\} once"):
        opened(keys, whether=["is it?"])
    with pytest.raises(ConfigError, match=r"give templates here or in data.source.whether"):
        opened(keys, what=[], whether=[])
    assert len(listed(keys, whether=[])) == len(listed(keys, what=[])) == 60
    for split in ("train", "test"):
        folder = tmp_path / "one" / split / "bar"
        folder.mkdir(parents=True)
        draw("red", "bar", 0).save(folder / "0.png")
    pairs = {"kind": "folder", "path": str(tmp_path / "one"), "template": "{}"}
    with pytest.raises(DataError, match="every train picture has the label 'bar': nothing to ask"):
        opened(keys, pairs=pairs)
    assert len(listed(keys, pairs=pairs, whether=[])) == 1


def test_a_sample_without_caption_is_named_at_opening(tmp_path: Path) -> None:
    table = pa.table({"image": [BROKEN] * 2, "caption": ["red", " "]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet#1: the picture has no caption"):
        opened({"kind": "captions", "pairs": {"kind": "parquet", "path": str(tmp_path)}})
