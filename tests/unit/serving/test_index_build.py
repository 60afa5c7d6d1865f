"""`fmray index` by its real door: every vector is the model's, what is damaged is named, a killed build goes on."""

from __future__ import annotations

import io
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from PIL import Image

from fmray.cli import door, index
from fmray.config.index import IndexConfig
from fmray.config.loading import load_config
from fmray.data.transforms import decode_rgba
from fmray.errors import ConfigError, DataError, MissingExtra
from fmray.evaluation.embed import embed_pictures
from fmray.models.saved import load_dual_encoder
from fmray.pipeline import index as building
from fmray.pipeline.index import build_index
from fmray.pipeline.index_pictures import KeyedPictures
from fmray.serving.index_store import PictureIndex, checkpoint_hash, open_index
from tests.endpoint import picture
from tests.unit.serving.index_folders import COLORS, index_config, manifest_of, write_pictures


def content(opened: PictureIndex) -> list[tuple[str, tuple[str, ...], bytes | None]]:
    return [(key, opened.captions[row], opened.thumbnail(row)) for row, key in enumerate(opened.keys)]


def vectors(opened: PictureIndex) -> np.ndarray:
    return opened._vectors_ND  # no one but a test needs them


def test_every_picture_has_the_models_vector_under_its_path(checkpoint: str, tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures")
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.png").write_bytes(picture())
    built = build_index(index_config(checkpoint, root, tmp_path / "index"))
    opened = open_index(tmp_path / "index", served={checkpoint_hash(checkpoint): 8})
    assert built.facts == opened.facts
    assert (built.left_out, built.resumed) == (0, 0)
    assert opened.keys == [f"{color}/{number}.png" for color in COLORS for number in (0, 1)]
    loaded = load_dual_encoder(checkpoint, torch.device("cpu"))
    rgba = [decode_rgba((root / key).read_bytes(), loaded.image, name=key) for key in opened.keys]
    with torch.no_grad():
        expected_ND = embed_pictures(loaded, torch.stack(rgba)).numpy()
    np.testing.assert_allclose(vectors(opened), expected_ND, atol=1e-6)
    for row in range(len(opened.keys)):
        small = Image.open(io.BytesIO(opened.thumbnail(row) or b""))
        assert (small.format, small.size, small.mode) == ("JPEG", (96, 96), "RGB")
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        ".lock",
        "manifest.json",
        opened.facts.version,
    ]


def test_any_source_gives_its_names_and_captions(checkpoint: str, tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures")
    source = {"kind": "folder", "path": str(root), "template": "a {} thing"}
    build_index(index_config(checkpoint, root, tmp_path / "a", source=source, thumbnail=0))
    opened = open_index(tmp_path / "a")
    assert [opened.captions[0], opened.captions[-1]] == [("a black thing",), ("a red thing",)]
    assert opened.thumbnail(0) is None
    lines = '{"image": "red/0.png", "caption": ["red", "rot"]}\n{"image": "../outside.png", "caption": "x"}\n'
    (root / "test.jsonl").write_text(lines)
    (tmp_path / "outside.png").write_bytes(picture())
    source = {"kind": "jsonl", "path": str(root)}
    build_index(
        index_config(checkpoint, root, tmp_path / "b", source=source, split="test", max_bad_share=0.5)
    )
    assert [row[:2] for row in content(open_index(tmp_path / "b"))] == [("red/0.png", ("red", "rot"))]
    [line] = (tmp_path / "b" / "left_out.txt").read_text().splitlines()
    assert line.startswith("../outside.png\t")
    assert line.endswith("its key must be a relative path without '..'")


def test_damaged_pictures_are_left_out_up_to_a_share(checkpoint: str, tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures")
    (root / "blue" / "1.png").write_bytes(picture()[:60])
    (root / "red" / "a\nb.png").write_bytes(picture())
    config = index_config(checkpoint, root, tmp_path / "index", max_bad_share=0.15)
    with pytest.raises(DataError) as error:
        build_index(config.replace(max_bad_share=0.1))
    assert str(error.value).startswith("2 of 13 pictures cannot be used, more than max_bad_share=0.1; ")
    assert "left_out.txt names them; the first: blue/1.png: the picture is truncated or damaged" in str(
        error.value
    )
    built = build_index(config.replace(max_bad_share=0.2))
    assert built.left_out == 2
    lines = (tmp_path / "index" / "left_out.txt").read_text().splitlines()
    assert [line.partition("\t")[0] for line in lines] == ["blue/1.png", "red/a b.png"]
    opened = open_index(tmp_path / "index")
    assert len(opened.keys) == 11
    assert "blue/1.png" not in opened.keys
    (root / "blue" / "1.png").write_bytes(picture())
    (root / "red" / "a\nb.png").unlink()
    assert build_index(config).left_out == 0
    assert not (tmp_path / "index" / "left_out.txt").exists()


@dataclass(frozen=True)
class Interrupted:
    """Pictures during whose reading the process is told to stop."""

    pictures: KeyedPictures
    at: int

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, row: int) -> str:
        return self.pictures.key(row)

    def read(self, row: int) -> tuple[bytes, tuple[str, ...]]:
        if row == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.pictures.read(row)


def test_a_build_told_to_stop_goes_on_where_it_was(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_pictures(tmp_path / "pictures", each=4)
    config = index_config(checkpoint, root, tmp_path / "index", batch_size=2)
    whole = build_index(config.replace(output=str(tmp_path / "whole")))
    assert whole.facts is not None
    with monkeypatch.context() as patch:
        really = building.open_pictures
        patch.setattr(building, "open_pictures", lambda config: Interrupted(really(config), at=7))
        assert build_index(config).facts is None
    with pytest.raises(DataError, match="not an index, or not finished"):
        open_index(tmp_path / "index")
    [working] = (tmp_path / "index").glob(".building-*")
    parts = sorted(working.glob("*.arrow"))
    parts[0].write_bytes(parts[0].read_bytes()[:100])  # and the disk lost a part
    resumed = build_index(config)
    assert resumed.facts is not None
    assert 2 <= resumed.resumed == 2 * (len(parts) - 1) < 24
    assert resumed.facts.files == whole.facts.files
    assert not working.exists()
    assert build_index(config).resumed == 0  # a finished one is built anew


def test_parts_made_from_something_else_are_not_taken(checkpoint: str, tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures")
    (root / "red" / "1.png").write_bytes(b"")
    config = index_config(checkpoint, root, tmp_path / "index")
    with pytest.raises(DataError, match="1 of 12 pictures cannot be used"):
        build_index(config)
    (root / "red" / "1.png").write_bytes(picture())
    assert build_index(config.replace(thumbnail=32)).resumed == 0
    assert not list((tmp_path / "index").glob(".building-*"))


def test_the_version_before_stays_for_readers_and_older_ones_go(checkpoint: str, tmp_path: Path) -> None:
    config = index_config(checkpoint, write_pictures(tmp_path / "pictures", each=1), tmp_path / "index")
    versions = []
    for _ in range(3):
        build_index(config)
        versions.append(manifest_of(tmp_path / "index")["version"])
    assert {path.name for path in (tmp_path / "index").glob("v-*")} == set(versions[1:])


def test_a_graph_finds_what_an_exact_index_finds(checkpoint: str, tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures", each=3)
    flat, graph = (
        index_config(checkpoint, root, tmp_path / name, hnsw_above=limit)
        for name, limit in (("f", 18), ("g", 17))
    )
    assert [build_index(config).facts.kind for config in (flat, graph)] == ["flat", "hnsw"]  # type: ignore[union-attr]
    exact, near = open_index(tmp_path / "f"), open_index(tmp_path / "g")
    for query_D in vectors(exact):
        expected, found = exact.search(query_D, 18), near.search(query_D, 18)
        np.testing.assert_allclose([h.score for h in found], [h.score for h in expected], atol=1e-6)


def test_what_cannot_be_built_is_said_in_one_line(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^source.path='.*empty': holds no picture file \(png, jpg, "):
        build_index(index_config(checkpoint, tmp_path / "empty", tmp_path / "index"))
    with pytest.raises(DataError, match=r"^source.path='.*emty': no such folder; did you mean '.*empty'\?$"):
        build_index(index_config(checkpoint, tmp_path / "emty", tmp_path / "index"))
    root = write_pictures(tmp_path / "pictures", each=1)
    with pytest.raises(ConfigError, match=r"^output='s3://bucket/index': write a local folder"):
        load_config(
            IndexConfig, {}, ["checkpoint=a", "source.path=b", "output=s3://bucket/index"], door="index"
        )
    with pytest.raises(ConfigError, match=r"^source.root='x': unknown key; there are: kind, path"):
        load_config(
            IndexConfig, {}, ["checkpoint=a", "output=b", "source.root=x", "source.path=p"], door="index"
        )
    config = index_config(checkpoint, root, tmp_path / "index")
    (tmp_path / "index").mkdir()
    with (
        filelock.FileLock(tmp_path / "index" / ".lock"),
        pytest.raises(ConfigError, match="another process builds"),
    ):
        build_index(config)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"^fmray index needs faiss, .*fmray\[search\]"):
        build_index(config)


def test_the_door_tells_what_it_built(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_pictures(tmp_path / "pictures", each=1)
    words = [
        f"checkpoint={checkpoint}",
        f"source.path={root}",
        f"output={tmp_path / 'index'}",
        "progress=false",
    ]
    assert door(index, words) == 0
    assert capsys.readouterr().out.startswith("6 pictures, 0 left out, ")
    assert door(index, [*words, "source.kind=nothing"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: source.kind='nothing': must be one of files, emoji, hub"
    )
