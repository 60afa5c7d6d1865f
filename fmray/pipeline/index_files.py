"""An index being built: parts that survive an end in between, then the finished files, put in place in one step.

OUTPUT/.building-<16 hex>/part-00000017.arrow   what is done already; gone when the index is complete
OUTPUT/left_out.txt                             pictures that could not be used, with reasons
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from fmray.config.index import IndexConfig
from fmray.errors import ConfigError, DataError
from fmray.manifest import MANIFEST, sum_file
from fmray.pipeline.index_parts import EmbeddedPart, embedded_part
from fmray.serving.index_store import (
    COLUMNS,
    FORMAT,
    PICTURES,
    THUMBNAILS,
    VECTORS,
    FileFacts,
    IndexFacts,
    faiss_library,
    read_facts,
)

LEFT_OUT = "left_out.txt"
_VERSION = re.compile(r"v-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Workshop:
    """Parts of one index: `Workshop(Path("runs/index/.building-00ff…"), parts=12)`."""

    folder: Path
    parts: int

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:08}.arrow"

    def put(self, part: int, content: bytes) -> None:
        """Keep a part; whole or not at all."""
        beside = self.path(part).with_suffix(".tmp")
        beside.write_bytes(content)
        beside.replace(self.path(part))

    def get(self, part: int) -> EmbeddedPart:
        """A part; raises DataError where it is not there or damaged."""
        try:
            return embedded_part(self.path(part).read_bytes())
        except OSError as error:
            raise DataError(f"{self.path(part)}: cannot be read ({error.strerror})") from None
        except DataError as error:
            raise DataError(f"{self.path(part)}: {error}; start again, and it is made again") from None

    def done(self) -> set[int]:
        """Parts that need not be made again: sound on the disk, and nothing was left out, which may have been repaired since."""
        sound = set()
        for part in range(self.parts):
            try:
                if not self.get(part).left_out:
                    sound.add(part)
            except DataError:
                continue
        return sound


@contextmanager
def workshop(output: Path, made_from: object, parts: int) -> Iterator[Workshop]:
    """The place where an index for `output` is built, alone; one made from something else is cleared away.

    `made_from`: all that decides what parts hold, as JSON. Raises ConfigError where another process builds here.
    """
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(output / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(
            "output", str(output), "another process builds an index here; wait for it"
        ) from None
    except OSError as error:
        raise ConfigError("output", str(output), f"cannot be written ({error.strerror})") from None
    try:
        folder = output / f".building-{digest[:16]}"
        for other in output.glob(".building-*"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(exist_ok=True)
        yield Workshop(folder, parts)
    finally:
        lock.release()


def write_left_out(output: Path, left_out: Sequence[tuple[str, str]]) -> None:
    """Keys and reasons, a line each; no file where there are none."""
    path = output / LEFT_OUT
    if not left_out:
        path.unlink(missing_ok=True)
        return
    lines = [" ".join(f"{key}\t{reason}".splitlines()) + "\n" for key, reason in left_out]
    _replace(path, "".join(lines).encode("utf-8", "backslashreplace"))


def finish(
    output: Path, parts: Workshop, checkpoint: str, dim: int, count: int, config: IndexConfig
) -> IndexFacts:
    """The parts as an index in `output`: `count` pictures in the order of their source.

    Readers see the index before until the last step, and its files stay, for those that have just read its manifest; older ones
    go. Raises DataError where there is no picture.
    """
    if not count:
        raise DataError("not one picture can be read: there is nothing to index")
    place = output / f"v-{secrets.token_hex(8)}"
    place.mkdir()
    try:
        kind = _write_files(place, parts, dim, count, config)
        sums = {name: sum_file(place / name, place) for name in (VECTORS, PICTURES, THUMBNAILS)}
    except (DataError, OSError):
        shutil.rmtree(place)
        raise
    facts = IndexFacts(
        format=FORMAT,
        version=place.name,
        checkpoint=checkpoint,
        kind=kind,
        dim=dim,
        count=count,
        links=config.hnsw.links if kind == "hnsw" else 0,
        search=config.hnsw.search if kind == "hnsw" else 0,
        thumbnail=config.thumbnail,
        built_at=int(time.time()),
        files={name: FileFacts(size=one.size, sha256=one.sha256) for name, one in sums.items()},
    )
    before = _current(output)
    _replace(output / MANIFEST, (facts.model_dump_json(indent=1) + "\n").encode())
    for other in output.iterdir():
        if _VERSION.fullmatch(other.name) and other.name not in (place.name, before):
            shutil.rmtree(other)
    shutil.rmtree(parts.folder)
    return facts


def _write_files(
    place: Path, parts: Workshop, dim: int, count: int, config: IndexConfig
) -> Literal["flat", "hnsw"]:
    """The three files of an index; its kind."""
    faiss = faiss_library("fmray index")
    kind = config.kind
    if kind == "auto":
        kind = "hnsw" if count > config.hnsw_above else "flat"
    index = faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, config.hnsw.links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.hnsw.build
    with (
        (place / THUMBNAILS).open("wb") as thumbnails,
        pq.ParquetWriter(place / PICTURES, COLUMNS) as pictures,
    ):
        for part in range(parts.parts):
            here = parts.get(part)
            if not here.keys:
                continue
            if here.vectors_BD.shape[1] != dim:
                raise DataError(
                    f"{parts.path(part)}: holds vectors of another width; start again with an empty folder"
                )
            index.add(here.vectors_BD)
            thumbnails.writelines(here.thumbnails)
            columns = [here.keys, here.captions, [len(thumbnail) for thumbnail in here.thumbnails]]
            pictures.write_table(pa.table(columns, schema=COLUMNS))
    faiss.write_index(index, str(place / VECTORS))
    return kind


def _current(output: Path) -> str | None:
    """The version that readers use now."""
    try:
        return read_facts(output).version
    except DataError:
        return None


def _replace(path: Path, content: bytes) -> None:
    """The content, on the disk, in one step."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
