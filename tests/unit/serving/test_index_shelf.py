"""Indexes replaced while they are searched: never half of one, and what is broken changes nothing but the log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fmray.errors import CheckpointError, DataError, RequestError
from fmray.serving.index_shelf import IndexShelf
from tests.unit.serving.index_folders import (
    MADE_BY,
    changed,
    manifest_of,
    put_manifest,
    unit_rows,
    write_index,
)

QUERY_D = unit_rows(1, 8, seed=9)[0]
SERVED = {MADE_BY: 8}


def shelf_of(**folders: Path) -> IndexShelf:
    paths = {name: str(folder) for name, folder in folders.items()}
    return IndexShelf(paths, served=SERVED, look_seconds=0.02, again_seconds=0.1)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def count(shelf: IndexShelf, name: str | None = None) -> int:
    return shelf.get(name)[1].facts.count


def test_an_index_is_found_by_its_name_and_the_only_one_without(tmp_path: Path) -> None:
    small, large = write_index(tmp_path / "s", unit_rows(3, 8)), write_index(tmp_path / "l", unit_rows(5, 8))
    one, two, none = shelf_of(small=small), shelf_of(small=small, large=large), shelf_of()
    assert one.get(None)[0] == "small"
    assert (count(two, "small"), count(two, "large")) == (3, 5)
    assert two.names == ["small", "large"]
    for shelf, name, status, code, message in (
        (two, None, 400, "missing_required_parameter", "index: name one of small, large"),
        (two, "other", 404, "index_not_found", "there is no index 'other'; there are: small, large"),
        (one, "x" * 10_000, 404, "index_not_found", f"there is no index {'x' * 100!r}; there are: small"),
        (
            none,
            None,
            404,
            "index_not_found",
            "no index is served here; build one with fmray index, and start",
        ),
    ):
        with pytest.raises(RequestError) as error:
            shelf.get(name)
        assert (error.value.status, error.value.code, error.value.param) == (status, code, "index")
        assert error.value.message.startswith(message)


def test_opening_refuses_what_cannot_be_searched(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "index", unit_rows(3, 8))
    with pytest.raises(CheckpointError, match="was made by checkpoint cccccccccccc, served is none"):
        IndexShelf({"a": str(folder)}, served={})
    with pytest.raises(DataError, match="not an index, or not finished"):
        shelf_of(a=folder, b=tmp_path / "empty")


def test_a_new_index_takes_the_old_ones_place_without_a_restart(tmp_path: Path) -> None:
    folder = write_index(tmp_path, unit_rows(3, 8))
    with shelf_of(photos=folder) as shelf:
        before = shelf.get("photos")[1]
        write_index(tmp_path, unit_rows(5, 8))
        until(lambda: count(shelf) == 5)
        assert before.facts.count == 3
        assert (
            len(before.search(QUERY_D, 10)) == 3
        )  # a search that runs meanwhile ends on the index it began with


@pytest.mark.parametrize("fault", ["no manifest", "half a file", "another checkpoint", "NaN", "no JSON"])
def test_a_broken_new_index_keeps_the_old_one_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    folder = write_index(tmp_path, unit_rows(3, 8))
    with caplog.at_level(logging.WARNING), shelf_of(photos=folder) as shelf:
        if fault == "no manifest":
            (folder / "manifest.json").unlink()
        elif fault == "half a file":
            manifest = manifest_of(folder)
            changed(folder, "index.faiss", lambda content: content[:50], summed_again=False)
            put_manifest(folder, {**manifest, "built_at": 1})
        elif fault == "another checkpoint":
            write_index(tmp_path, unit_rows(4, 8), checkpoint="d" * 64)
        elif fault == "NaN":
            write_index(tmp_path, np.full((4, 8), np.nan, dtype=np.float32))
        else:
            put_manifest(folder, "{")
        until(lambda: bool(caplog.messages))
        time.sleep(0.4)  # several looks and another try
        assert count(shelf) == 3
        assert len(shelf.get(None)[1].search(QUERY_D, 10)) == 3
        [line] = caplog.messages
        assert line.startswith("index photos stays as it was: ")
        assert "\n" not in line
        write_index(tmp_path, unit_rows(6, 8))
        until(lambda: count(shelf) == 6)


def test_what_is_read_is_one_index_or_the_other_while_they_change_places(tmp_path: Path) -> None:
    """Index A: every key starts with a, B: with b. A search that sees both letters saw half of each."""
    sizes = {"a": 40, "b": 60}

    def write(letter: str) -> None:
        keys = [f"{letter}{row}" for row in range(sizes[letter])]
        write_index(tmp_path, unit_rows(sizes[letter], 8, seed=sizes[letter]), keys, [[letter]] * len(keys))

    write("a")
    ended = threading.Event()
    seen: set[str] = set()
    wrong: list[object] = []

    def read(shelf: IndexShelf) -> None:
        while not ended.is_set():
            index = shelf.get(None)[1]
            hits = index.search(QUERY_D, 100)
            letters = {hit.key[0] for hit in hits} | {str(hit.caption) for hit in hits}
            seen.update(letters)
            if len(letters) != 1 or len(hits) != sizes[letters.pop()]:
                wrong.append(hits)

    with shelf_of(photos=tmp_path) as shelf:
        readers = [threading.Thread(target=read, args=(shelf,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        for letter in "babab":
            write(letter)
            until(lambda letter=letter: count(shelf) == sizes[letter])  # type: ignore[misc]
        ended.set()
        for reader in readers:
            reader.join()
    assert not wrong
    assert seen == {"a", "b"}


def test_the_watch_ends_with_the_shelf(tmp_path: Path) -> None:
    folder = write_index(tmp_path, unit_rows(3, 8))
    before = threading.active_count()
    shelf = shelf_of(photos=folder)
    shelf.start()
    shelf.start()
    assert threading.active_count() == before + 1
    shelf.close()
    assert threading.active_count() == before
    assert len(shelf.get(None)[1].search(QUERY_D, 10)) == 3
