"""An index in memory finds what it must, and one that is damaged or not ours is refused in one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from fmray.errors import CheckpointError, DataError, MissingExtra
from fmray.serving.index_store import checkpoint_hash, open_index, why_not_a_key
from tests.endpoint import save_tiny_checkpoint
from tests.unit.serving.index_folders import (
    MADE_BY,
    changed,
    manifest_of,
    put_manifest,
    unit_rows,
    write_index,
)

VECTORS_ND = unit_rows(40, 8)
KEYS = [f"{'ab' if row % 2 else 'cd'}/{row:02}.png" for row in range(40)]
CAPTIONS = [[f"number {row}", "odd" if row % 2 else "even"] for row in range(40)]
SERVED = {MADE_BY: 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_index(tmp_path / "index", VECTORS_ND, KEYS, CAPTIONS)


# --------------------------------------------------------------------------------------------------- searching


@pytest.mark.parametrize("links", [0, 16], ids=["flat", "hnsw"])
def test_the_nearest_are_those_of_all_inner_products(tmp_path: Path, links: int) -> None:
    index = open_index(write_index(tmp_path, VECTORS_ND, KEYS, CAPTIONS, links=links), served=SERVED)
    for query_D in unit_rows(20, 8, seed=1):
        scores_N = VECTORS_ND @ query_D
        hits = index.search(query_D, 7)
        assert [hit.row for hit in hits] == np.argsort(-scores_N)[:7].tolist()
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores_N)[::-1][:7], atol=1e-6)
        assert [(hit.key, hit.caption) for hit in hits] == [(KEYS[h.row], CAPTIONS[h.row][0]) for h in hits]


@pytest.mark.parametrize("links", [0, 16], ids=["flat", "hnsw"])
@pytest.mark.parametrize(
    ("prefix", "captions", "left"),
    [
        ("ab/", None, [row for row in range(40) if row % 2]),
        ("", ["even"], [row for row in range(40) if row % 2 == 0]),
        ("ab/1", ["odd"], [11, 13, 15, 17, 19]),
        ("ab/", ["even"], []),
        ("", ["number 3", "number 4", "nobody's"], [3, 4]),
        ("ab/01.png", None, [1]),
        ("ab/01.png/", None, []),
        ("", [], []),
    ],
)
def test_a_filter_leaves_exactly_what_it_says(
    tmp_path: Path, links: int, prefix: str, captions: list[str] | None, left: list[int]
) -> None:
    index = open_index(write_index(tmp_path, VECTORS_ND, KEYS, CAPTIONS, links=links), served=SERVED)
    query_D = unit_rows(1, 8, seed=2)[0]
    order = sorted(left, key=lambda row: -float(VECTORS_ND[row] @ query_D))
    found = [hit.row for hit in index.search(query_D, 30, prefix=prefix, captions=captions)]
    assert found == order[:30]


def test_equal_scores_come_in_the_order_of_the_index_and_no_more_than_there_are(tmp_path: Path) -> None:
    same_ND = np.tile(unit_rows(1, 8), (5, 1))
    index = open_index(write_index(tmp_path, same_ND), served=SERVED)
    assert [hit.row for hit in index.search(same_ND[0], 100)] == [0, 1, 2, 3, 4]
    assert [hit.row for hit in index.search(same_ND[0], 100, prefix="picture-")] == [0, 1, 2, 3, 4]
    assert index.search(same_ND[0], 1)[0].caption is None


def test_thumbnails_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    folder = write_index(tmp_path, VECTORS_ND[:3], thumbnails=[b"first", b"", b"third"])
    index = open_index(folder, served=SERVED)
    assert [index.thumbnail(row) for row in range(3)] == [b"first", None, b"third"]
    path = folder / index.facts.version / "thumbnails.bin"
    with path.open("r+b") as stream:  # cut off under the reader: no error, no half picture
        stream.truncate(7)
    assert [index.thumbnail(row) for row in range(3)] == [b"first", None, None]
    shutil.rmtree(folder)
    assert index.thumbnail(0) == b"first"


# ---------------------------------------------------------------------------------------------------- refused


def test_an_index_of_another_checkpoint_is_refused(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"was made by checkpoint c{12}, served is d{12} and e{12}; build it again"
    ):
        open_index(folder, served={"d" * 64: 8, "e" * 64: 8})
    with pytest.raises(CheckpointError, match=r"holds vectors of width 8, and its model's have 16$"):
        open_index(folder, served={MADE_BY: 16})
    assert open_index(folder).facts.count == 40


def test_a_checkpoints_hash_is_its_contents(tmp_path: Path) -> None:
    first, again = save_tiny_checkpoint(tmp_path / "a", seed=1), save_tiny_checkpoint(tmp_path / "b", seed=1)
    other = save_tiny_checkpoint(tmp_path / "c", seed=2)
    assert checkpoint_hash(first) == checkpoint_hash(again) == checkpoint_hash(f"file://{first}")
    assert checkpoint_hash(first) != checkpoint_hash(other)
    config = Path(again, "config.json")
    config.write_text(config.read_text() + " ")
    assert checkpoint_hash(first) != checkpoint_hash(again)


MANIFESTS: dict[str, tuple[object, str]] = {
    "empty file": ("", "is not an index's manifest"),
    "no JSON": ("{", "is not an index's manifest"),
    "a list": ([], "is not an index's manifest"),
    "a training checkpoint's": ({"format": 1, "step": 3, "files": {}}, "is not an index's manifest"),
    "deep": ("[" * 60_000, "is not an index's manifest"),
    "huge": (" " * 70_000, "has more than 65536 bytes"),
    "a later format": ({"format": 2}, "is not an index's manifest (format: "),
    "a version elsewhere": ({"version": "../../etc"}, "is not an index's manifest (version: "),
    "a million million vectors": ({"count": 10**12}, "is not an index's manifest (count: "),
    "no vectors": ({"count": 0}, "is not an index's manifest (count: "),
    "a negative width": ({"dim": -1}, "is not an index's manifest (dim: "),
    "text for a number": ({"dim": "8"}, "is not an index's manifest (dim: "),
    "an unknown key": ({"path": "/etc"}, "is not an index's manifest (path: "),
    "a file elsewhere": (
        {"files": {"../../etc/passwd": {"size": 1, "sha256": "0" * 64}}},
        "(files: not the three",
    ),
    "a width that is not the file's": ({"dim": 16}, "has not the size of 40 vectors of width 16"),
    "a width that fits the size": ({"dim": 4, "count": 80}, "holds 40 vectors of width 8"),
    "another kind": ({"kind": "hnsw", "links": 32, "search": 64}, "is not a hnsw index of inner products"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_none_is_refused(folder: Path, case: str) -> None:
    content, message = MANIFESTS[case]
    partial = isinstance(content, dict) and "step" not in content
    put_manifest(folder, {**manifest_of(folder), **content} if partial else content)  # type: ignore[dict-item]
    with pytest.raises(DataError, match=re.escape(message)) as error:
        open_index(folder, served={MADE_BY: content["dim"]} if partial and "dim" in content else SERVED)  # type: ignore[index,operator]
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_index_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            DataError, match=r"manifest.json: cannot be read \(No such file or directory\): not an index"
        ):
            open_index(folder)


FILES = ("index.faiss", "pictures.parquet", "thumbnails.bin")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_altered_file_is_refused_before_it_is_parsed(tmp_path: Path, name: str) -> None:
    thumbnails = [b"small"] * 40
    for change, message in (
        (lambda content: content[:-1], "is truncated or altered"),
        (lambda content: b"", "is truncated or altered"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is altered (its checksum"),
    ):
        folder = write_index(tmp_path, VECTORS_ND, KEYS, CAPTIONS, thumbnails)
        changed(folder, name, change, summed_again=False)
        with pytest.raises(DataError, match=re.escape(f"{name}: {message}")):
            open_index(folder)
    (folder / manifest_of(folder)["version"] / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(No such file or directory\)$"):
        open_index(folder)


@pytest.mark.parametrize("links", [0, 16], ids=["flat", "hnsw"])
def test_a_faiss_file_cut_anywhere_whose_sum_agrees_ends_in_one_line(tmp_path: Path, links: int) -> None:
    whole = write_index(tmp_path, VECTORS_ND, links=links)
    content = (whole / manifest_of(whole)["version"] / "index.faiss").read_bytes()
    for size in range(0, len(content), 97):
        changed(whole, "index.faiss", lambda _, size=size: content[:size], summed_again=True)  # type: ignore[misc]
        with pytest.raises(DataError, match=r"index.faiss: (has not the size|is not a faiss index)"):
            open_index(whole)


def faiss_bytes(index: object) -> Callable[[bytes], bytes]:
    return lambda _: faiss.serialize_index(index).tobytes()


def filled(index: object, vectors_ND: np.ndarray) -> object:
    index.add(vectors_ND)  # type: ignore[attr-defined]
    return index


def with_row(value: float) -> np.ndarray:
    vectors_ND = VECTORS_ND.copy()
    vectors_ND[17] = value
    return vectors_ND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            faiss_bytes(filled(faiss.IndexFlatIP(8), with_row(np.nan))),
            "the vector of row 17 has norm nan, not 1",
        ),
        (
            faiss_bytes(filled(faiss.IndexFlatIP(8), with_row(np.inf))),
            "the vector of row 17 has norm inf, not 1",
        ),
        (faiss_bytes(filled(faiss.IndexFlatIP(8), with_row(0.0))), "the vector of row 17 has norm 0, not 1"),
        (faiss_bytes(filled(faiss.IndexFlatL2(8), VECTORS_ND)), "is not a flat index of inner products"),
        (faiss_bytes(filled(faiss.IndexFlatIP(8), VECTORS_ND[:39])), "holds 39 vectors of width 8"),
        (
            faiss_bytes(filled(faiss.IndexFlatIP(16), VECTORS_ND.reshape(20, 16))),
            "holds 20 vectors of width 16",
        ),
        (lambda content: bytes(len(content)), "is not a faiss index"),
    ],
    ids=["NaN", "infinite", "zero", "distances", "fewer", "other width", "zeros"],
)
def test_vectors_that_cannot_be_searched_are_refused(
    folder: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    changed(folder, "index.faiss", change, summed_again=True)
    with pytest.raises(DataError, match=re.escape(f"index.faiss: {message}")):
        open_index(folder)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("../../etc/passwd", "must be a relative path without '..'"),
        ("a/../b.png", "must be a relative path without '..'"),
        ("/etc/passwd", "must be a relative path without '..'"),
        ("..\\windows.png", "a control character, a backslash"),
        ("a\nb.png", "a control character, a backslash"),
        ("a\0.png", "a control character, a backslash"),
        ("", "must have 1 to 1024 characters"),
        ("x" * 1025, "must have 1 to 1024 characters"),
    ],
)
def test_a_key_that_leads_elsewhere_is_refused(tmp_path: Path, key: str, reason: str) -> None:
    assert reason in str(why_not_a_key(key))
    folder = write_index(tmp_path, VECTORS_ND[:2], ["fine.png", key])
    with pytest.raises(DataError, match=re.escape(reason)) as error:
        open_index(folder)
    assert "\n" not in str(error.value)


def test_honest_keys_are_taken() -> None:
    for key in ("a.png", "2024/..hidden/a..b.png", "owner/pets[train]#17", "카드/하트.png", "U+1F436.png"):
        assert why_not_a_key(key) is None


def test_pictures_beyond_the_bounds_are_refused(tmp_path: Path) -> None:
    for number, (keys, captions, message) in enumerate(
        [
            (["a", "a"], [[], []], "some keys stand there twice"),
            (["a", "b"], [["x" * 4097], []], "row 0 has captions beyond the bounds"),
            (["a", "b"], [[], ["x"] * 257], "row 1 has captions beyond the bounds"),
            (["a", "b", "c"], [[], [], []], "has 3 rows, 2 expected"),
        ]
    ):
        folder = write_index(tmp_path / str(number), VECTORS_ND[:2], keys, captions)
        with pytest.raises(DataError, match=message):
            open_index(folder)
    folder = write_index(tmp_path / "thumbnails", VECTORS_ND[:2], thumbnails=[b"x" * 300_000, b""])
    with pytest.raises(DataError, match="row 0 has a thumbnail beyond the bounds"):
        open_index(folder)
    folder = write_index(tmp_path / "parquet", VECTORS_ND[:2])
    changed(folder, "pictures.parquet", lambda content: content[: len(content) // 2], summed_again=True)
    with pytest.raises(DataError, match=r"pictures.parquet: cannot be read as Parquet$"):
        open_index(folder)
    folder = write_index(tmp_path / "lengths", VECTORS_ND[:2], thumbnails=[b"one", b"two"])
    changed(folder, "thumbnails.bin", lambda content: content + b"more", summed_again=True)
    with pytest.raises(DataError, match=r"thumbnails.bin: does not hold what pictures.parquet says$"):
        open_index(folder)


def test_without_faiss_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'fmray[search]'")):
        open_index(folder)


def test_a_manifest_is_plain_json_that_names_no_place(folder: Path) -> None:
    assert json.dumps(manifest_of(folder)).count("/") == 0
