"""Every kind of source on real files: what it reads, and what it says when the data is wrong."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fmray.config.schema import (
    FolderSource,
    HubSource,
    ImageConfig,
    JsonlSource,
    ParquetSource,
    SourceConfig,
    WebDatasetSource,
)
from fmray.data import parquet
from fmray.data.sources import Source, open_source
from fmray.data.transforms import decode_rgba
from fmray.errors import ConfigError, DataError

CAPTIONS = ("red", "green", "blue", "black", "white", "grey")


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number * 40, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def check(source: Source, names: list[str]) -> None:
    """Six samples in order, by index from both ends, through pickle, and an IndexError past the end."""
    copy = pickle.loads(pickle.dumps(source))
    assert (len(source), len(copy)) == (6, 6)
    for index in (3, 0, 5, 1, 2, 4):
        for opened in (source, copy):
            sample = opened[index]
            assert (sample.name, opened.name(index)) == (names[index], names[index])
            assert (sample.image, sample.captions[0]) == (png(index), CAPTIONS[index])
    with pytest.raises(IndexError):
        source[6]


def refused(config: SourceConfig, *said: str, split: Any = "train") -> None:
    with pytest.raises(DataError) as error:
        open_source(config, split)
    assert "\n" not in str(error.value)
    for part in said:
        assert part in str(error.value)


# -------------------------------------------------------------------------------- all kinds with a path


@pytest.mark.parametrize("kind", [FolderSource, JsonlSource, ParquetSource, WebDatasetSource])
def test_path_that_does_not_exist(kind: Callable[..., SourceConfig], tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    wrong, right = str(tmp_path / "flower"), str(tmp_path / "flowers")
    refused(kind(path=wrong), f"data.source.path='{wrong}': no such folder; did you mean '{right}'?")
    (tmp_path / "file").write_text("")
    refused(kind(path=str(tmp_path / "file")), "is a file")
    refused(kind(path=str(tmp_path / "deep" / "deeper" / "none")), "no such folder")
    refused(kind(path=right), right)  # empty


# -------------------------------------------------------------------------------- folders


def write_folder(root: Path) -> None:
    for number, caption in enumerate(CAPTIONS):
        folder = root / f"{number}_{caption}"
        folder.mkdir(parents=True)
        (folder / "a.PNG").write_bytes(png(number))


def test_folder_of_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "test")
    source = open_source(FolderSource(path=str(tmp_path), template="a {}!"), "test")
    assert (source[2].name, source[2].image, source[2].captions) == ("2_blue/a.PNG", png(2), ("a 2 blue!",))
    assert len(pickle.loads(pickle.dumps(source))) == 6
    refused(FolderSource(path=str(tmp_path)), "has a folder 'test' and none for 'train'")
    with pytest.raises(ConfigError, match=r"data\.source\.template"):
        open_source(FolderSource(path=str(tmp_path), template="a"), "test")


def test_flat_folder_is_every_split_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path)
    (tmp_path / "0_red" / "notes.txt").write_text("…")
    (tmp_path / "empty").mkdir()
    assert len(open_source(FolderSource(path=str(tmp_path)), "train")) == 6
    assert "every split is the whole of it" in caplog.text
    assert "not taken, as they are no picture files: notes.txt" in caplog.text
    assert "the caption folder holds no picture" in caplog.text


def test_folder_problems(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    refused(FolderSource(path=str(tmp_path)), "no pictures (png, jpg")
    for number in range(7):
        (tmp_path / "train" / f"{number}.png").write_bytes(png(0))
    stray = "7 pictures lie in no caption folder: 0.png, 1.png, 2.png, 3.png, 4.png and 2 more"
    refused(FolderSource(path=str(tmp_path)), stray)


def test_picture_that_vanished_after_opening(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    source = open_source(FolderSource(path=str(tmp_path)), "train")
    (tmp_path / "train" / "0_red" / "a.PNG").unlink()
    with pytest.raises(DataError, match=r"0_red/a\.PNG: .* cannot be read \(No such file"):
        source[0]


# -------------------------------------------------------------------------------- JSON lines


def write_jsonl(root: Path, rows: list[dict[str, Any]]) -> JsonlSource:
    for number in range(6):
        (root / f"{number}.png").write_bytes(png(number))
    (root / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return JsonlSource(path=str(root))


GOOD_ROWS: list[dict[str, Any]] = [
    {"image": f"{n}.png", "caption": [c, "한국어"]} for n, c in enumerate(CAPTIONS)
]


def test_jsonl(tmp_path: Path) -> None:
    source = open_source(write_jsonl(tmp_path, GOOD_ROWS), "train")
    check(source, [f"{number}.png" for number in range(6)])
    assert source[0].captions == ("red", "한국어")
    refused(JsonlSource(path=str(tmp_path)), "holds no test.jsonl; there is train.jsonl", split="test")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "9.png", "caption": "x"}, "train.jsonl:7: there is no picture file '9.png'"),
        ({"image": 3, "caption": "x"}, "train.jsonl:7: there is no picture file 3"),
        (
            {"picture": "1.png", "caption": "x"},
            "train.jsonl:7: has no key 'image'; there are caption, picture",
        ),
        ({"image": "1.png", "caption": ""}, "1 lines have no caption under 'caption': lines 7; their keys: "),
        ({"image": "1.png"}, "1 lines have no caption"),
        (
            {"image": "1.png", "caption": 7},
            "train.jsonl:7: the caption must be a string or a list of strings",
        ),
        ({"image": "1.png", "caption": ["", " "]}, "train.jsonl:7: the picture has no caption"),
        ([], "train.jsonl:7: must be an object with keys, not list"),
    ],
)
def test_jsonl_problems(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    refused(write_jsonl(tmp_path, [*GOOD_ROWS, row]), said)


@pytest.mark.parametrize("line", [b'{"image": ', b'{"image": "\xff"}', b"[" * 100_000])
def test_jsonl_that_is_not_json(line: bytes, tmp_path: Path) -> None:
    config = write_jsonl(tmp_path, GOOD_ROWS[:1])
    with (tmp_path / "train.jsonl").open("ab") as stream:
        stream.write(line)
    refused(config, "train.jsonl:3: is not JSON (")


def test_empty_jsonl(tmp_path: Path) -> None:
    refused(write_jsonl(tmp_path, []), "train.jsonl: is empty")


# -------------------------------------------------------------------------------- parquet


def table(as_struct: bool = False, **replaced: list[Any]) -> pa.Table:
    pictures = [{"bytes": png(n), "path": None} if as_struct else png(n) for n in range(6)]
    return pa.table({"image": pictures, "caption": list(CAPTIONS), "other": list(range(6)), **replaced})


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet(as_struct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)  # every group pushes the one before it out
    rows = table(as_struct)
    pq.write_table(rows.slice(0, 5), tmp_path / "train-0.parquet", row_group_size=2)
    pq.write_table(rows.slice(5), tmp_path / "train-1.parquet")
    pq.write_table(rows, tmp_path / "test.parquet")
    source = open_source(ParquetSource(path=str(tmp_path)), "train")
    check(source, [*(f"train-0.parquet#{n}" for n in range(5)), "train-1.parquet#0"])
    assert source[-1].captions == ("grey",)
    assert len(source._cache) == 1  # type: ignore[attr-defined]


def test_parquet_problems(tmp_path: Path) -> None:
    config = ParquetSource(path=str(tmp_path))
    pq.write_table(table(), tmp_path / "test.parquet")
    refused(config, "holds no train*.parquet; there is test.parquet")
    (tmp_path / "train.parquet").write_bytes((tmp_path / "test.parquet").read_bytes()[:-100])
    refused(config, "train.parquet: is not a readable parquet file")
    pq.write_table(table().drop_columns(["caption"]), tmp_path / "train.parquet")
    refused(config, "data.source.caption_column='caption'", "has no such column; there are image, other")
    pq.write_table(table().slice(0, 0), tmp_path / "train.parquet")
    refused(config, "have no rows")


def test_parquet_rows_that_cannot_be_used(tmp_path: Path) -> None:
    pictures = [png(0), None, b"", png(3), png(4), png(5)]
    captions = ["", "a", None, "fine", "x", "y"]
    pq.write_table(table(image=pictures, caption=captions), tmp_path / "train.parquet")
    source = open_source(ParquetSource(path=str(tmp_path)), "train")
    with pytest.raises(DataError, match=r"train\.parquet#0: the picture has no caption"):
        source[0]
    with pytest.raises(DataError, match=r"train\.parquet#1: the picture must be encoded bytes, not NoneType"):
        source[1]
    with pytest.raises(DataError, match=r"train\.parquet#2: the caption must be a string"):
        source[2]
    assert source[3].captions == ("fine",)


def test_parquet_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(table(), path)
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(bytes(data))
    source = open_source(ParquetSource(path=str(tmp_path)), "train")
    with pytest.raises(DataError, match=r"train\.parquet#0: "):
        source[0]


# -------------------------------------------------------------------------------- hub


def hub_rows() -> datasets.Dataset:
    pictures = [{"bytes": png(number), "path": None} for number in range(6)]
    rows = datasets.Dataset.from_dict({"image": pictures, "caption": list(CAPTIONS), "other": list(range(6))})
    return rows.cast_column("image", datasets.Image())


def test_hub_folder_saved_to_disk(tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    datasets.DatasetDict({"train": hub_rows()}).save_to_disk(path)
    check(open_source(HubSource(path=path), "train"), [f"{path}[train]#{number}" for number in range(6)])
    part = open_source(HubSource(path=path, test_split="train[50%:]"), "test")
    assert (len(part), part[0].captions) == (3, ("black",))
    refused(HubSource(path=path), "split 'test' cannot be loaded (there are the splits train)", split="test")
    refused(
        HubSource(path=path, image_column="img"), "data.source.image_column='img'", "caption, image, other"
    )
    refused(HubSource(path=path, train_split="train[x]"), "split 'train[x]' cannot be loaded")


def test_hub_single_dataset_saved_to_disk(tmp_path: Path) -> None:
    hub_rows().save_to_disk(str(tmp_path / "one"))
    assert len(open_source(HubSource(path=str(tmp_path / "one")), "train")) == 6


def test_hub_folder_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    hub_rows().to_parquet(str(tmp_path / "rows" / "train.parquet"))
    path = str(tmp_path / "rows")
    check(open_source(HubSource(path=path), "train"), [f"{path}[train]#{number}" for number in range(6)])


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(HubSource(path="fmray/none"), "data.source.path='fmray/none'", "cannot be loaded")


# -------------------------------------------------------------------------------- webdataset


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def pair(number: int, stem: str) -> dict[str, bytes]:
    text = {f"{stem}.txt": f" {CAPTIONS[number]}\n".encode()}
    rich = {f"{stem}.json": json.dumps({"caption": [CAPTIONS[number], "more"]}).encode()}
    return {**(text if number % 2 else rich), f"{stem}.png": png(number)}


def test_webdataset(tmp_path: Path) -> None:
    first = {name: data for number in range(4) for name, data in pair(number, f"./dir/{number:03}").items()}
    write_shard(tmp_path / "train-0.tar", {**first, "./dir/000.cls": b"3", "README": b"x"})
    # A long name has a header of its own.
    write_shard(tmp_path / "train-1.tar", {**pair(4, "a"), **pair(5, "x" * 150)})
    source = open_source(WebDatasetSource(path=str(tmp_path)), "train")
    second = ["train-1.tar/a.png", f"train-1.tar/{'x' * 150}.png"]
    check(source, [*(f"train-0.tar/./dir/{number:03}.png" for number in range(4)), *second])
    assert source[0].captions == ("red", "more")
    refused(WebDatasetSource(path=str(tmp_path)), "holds no test*.tar; there is train-0.tar", split="test")


@pytest.mark.parametrize("left", [0, 100, 600, 3000, 5000])
def test_truncated_shard(left: int, tmp_path: Path) -> None:
    big = np.random.default_rng(0).bytes(4000)
    write_shard(tmp_path / "train.tar", {"a.png": png(0), "a.txt": b"a", "b.png": big})
    (tmp_path / "train.tar").write_bytes((tmp_path / "train.tar").read_bytes()[:left])
    refused(WebDatasetSource(path=str(tmp_path)), "train.tar: is truncated")


def test_webdataset_problems(tmp_path: Path) -> None:
    config, shard = WebDatasetSource(path=str(tmp_path)), tmp_path / "train.tar"
    with tarfile.open(shard, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    refused(config, "train.tar: is truncated or no plain tar file")
    write_shard(shard, {"a.txt": b"a"})
    refused(config, "the train shards hold no pictures")
    write_shard(shard, {"a.png": png(0), "b.png": png(1), "b.txt": b"b"})
    refused(config, "1 pictures have no .txt or .json beside them: train.tar/a")


@pytest.mark.parametrize(
    ("member", "content", "said"),
    [
        ("a.json", b"{", "a.json cannot be read ("),
        ("a.json", b'{"text": "x"}', "a.json has no key 'caption'; there is text"),
        ("a.json", b"[]", "a.json has no key 'caption'; there is list"),
        ("a.txt", b"\xff", "a.txt cannot be read ("),
        ("a.txt", b" ", "the picture has no caption"),
    ],
)
def test_webdataset_text_that_cannot_be_used(member: str, content: bytes, said: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "train.tar", {"a.png": png(0), member: content})
    source = open_source(WebDatasetSource(path=str(tmp_path)), "train")
    with pytest.raises(DataError, match=re.escape(f"train.tar/a.png: {said}")):
        source[0]


@pytest.mark.assets
def test_groceries_through_the_parquet_source() -> None:
    source = open_source(ParquetSource(path="asset:groceries"), "test")
    assert len(source) == 661
    assert len({source[index].captions[0] for index in range(0, 661, 5)}) == 14
    assert decode_rgba(source[350].image, ImageConfig(size=32), name="x")[3].min() == 255
