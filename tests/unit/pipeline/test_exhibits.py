"""What the galleries show, on embeddings with a known answer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image

from fmray.config.schema import JsonlSource
from fmray.data.loader import caption_key
from fmray.data.sources import Source, open_source
from fmray.evaluation.retrieval import PairEmbeddings
from fmray.pipeline.exhibits import galleries, spread
from fmray.pipeline.report import render
from fmray.pipeline.sections import Report

CAPTIONS = [["dog"], ["dog", "puppy"], ["cat", "kitten"]]
TEXT_PD = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0.6, 0.8], [0, 0.6, 0.8], [0, 0, 1.0]])


def split(folder: Path) -> tuple[Source, PairEmbeddings]:
    lines = []
    for index, captions in enumerate(CAPTIONS):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (80 * index, 0, 0)).save(stream, "PNG")
        (folder / f"{index}.png").write_bytes(stream.getvalue())
        lines.append(json.dumps({"image": f"{index}.png", "caption": captions}))
    (folder / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    keys = [caption_key(caption) for captions in CAPTIONS for caption in captions]
    owner = torch.tensor([0, 1, 1, 2, 2])
    pairs = PairEmbeddings(torch.eye(3), torch.arange(3), TEXT_PD, owner, torch.tensor(keys))
    return open_source(JsonlSource(path=str(folder)), "test"), pairs


def test_pictures_show_their_nearest_captions_each_once(tmp_path: Path) -> None:
    pictures, _ = galleries(*split(tmp_path))
    assert [exhibit.title for exhibit in pictures.exhibits] == ["dog", "dog", "cat"]
    assert [exhibit.badge for exhibit in pictures.exhibits] == ["found first"] * 3
    last = pictures.exhibits[2]
    assert last.picture == (tmp_path / "2.png").read_bytes()
    assert [answer.text for answer in last.answers] == ["kitten", "puppy", "cat", "dog"]
    assert [answer.right for answer in last.answers] == [True, False, True, False]
    assert [round(answer.score, 6) for answer in last.answers] == [1.0, 0.8, 0.8, 0.0]


def test_a_wrong_answer_comes_after_the_right_ones_with_its_place(tmp_path: Path) -> None:
    source, pairs = split(tmp_path)
    _, captions = galleries(source, pairs, " (ko)")
    assert captions.title.endswith("(ko)")
    assert [exhibit.title for exhibit in captions.exhibits] == ["dog", "cat", "kitten", "puppy"]
    missed = captions.exhibits[-1]
    assert (missed.badge, missed.good, missed.picture) == ("place 2", False, None)
    assert [answer.picture for answer in missed.answers[:1]] == [(tmp_path / "2.png").read_bytes()]
    assert "puppy" in render(Report("galleries", "", (), galleries(source, pairs)))


def test_a_choice_is_spread_from_first_to_last() -> None:
    assert spread(torch.arange(10), 4).tolist() == [0, 2, 5, 7]
    assert spread(torch.arange(3), 4).tolist() == [0, 1, 2]
