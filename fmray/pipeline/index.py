"""`fmray index`: pictures through a dual encoder's picture tower into an index that `/v1/search` answers from.

In this process or on Ray Data the same two functions make a part (`read_part`, `PictureTower`); the parts are cut from the
source, not from workers, so the vectors are the same.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fmray.config.base import RuntimeConfig
from fmray.config.index import IndexConfig
from fmray.errors import DataError, require_package
from fmray.manifest import find_model_folder
from fmray.pipeline.index_files import LEFT_OUT, Workshop, finish, workshop, write_left_out
from fmray.pipeline.index_parts import PictureTower, Reading, embedded_part, read_part
from fmray.pipeline.index_pictures import KeyedPictures, open_pictures
from fmray.runtime.context import stop_on_sigterm
from fmray.serving.index_store import IndexFacts, checkpoint_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexBuilt:
    """`IndexBuilt(facts, left_out=3, resumed=0, seconds=12.5)`; facts None: it was told to stop, and has kept what was done."""

    facts: IndexFacts | None
    left_out: int
    """Pictures that could not be used; `left_out.txt` names them."""
    resumed: int
    """Pictures that an earlier try had embedded already."""
    seconds: float


def build_index(config: IndexConfig) -> IndexBuilt:
    """Build the index that the configuration describes.

    The same call again after one that was ended goes on where that stopped; after one that was finished it builds anew.
    Raises MissingExtra, CheckpointError, DataError (no pictures, too many unreadable ones, equal keys), ConfigError, and with
    Ray ResourceError.
    """
    require_package("faiss", "search", "fmray index")
    started = time.perf_counter()
    checkpoint = find_model_folder(config.checkpoint)
    made_by = checkpoint_hash(checkpoint)
    pictures = open_pictures(config)
    keys = _keys_digest(pictures)
    # with Ray the actors load their own: this one only says what a picture becomes
    here = RuntimeConfig(device="cpu") if config.runtime.kind == "ray" else config.runtime
    tower = PictureTower(checkpoint, here)
    max_pixels = int(config.max_image_megapixels * 1e6)
    reading = Reading(pictures, tower.image, config.batch_size, config.thumbnail, max_pixels)
    source = config.source.model_dump(mode="json")
    made_from = [made_by, source, config.split, keys, config.batch_size, config.thumbnail, max_pixels]
    output = Path(config.output).expanduser()
    with workshop(output, made_from, reading.parts) as parts:
        done = parts.done()
        left_out = _make_parts(config, _maker(config, checkpoint, reading, tower), reading, parts, done)
        facts = None
        if left_out is not None:
            write_left_out(output, left_out)
            facts = finish(output, parts, made_by, tower.dim, len(pictures) - len(left_out), config)
    resumed = sum(_size(reading, part) for part in done)
    return IndexBuilt(facts, len(left_out or ()), resumed, time.perf_counter() - started)


def _keys_digest(pictures: KeyedPictures) -> str:
    """A checksum of all keys in their order; raises DataError where two are the same."""
    digest, seen = hashlib.sha256(), set()
    for row in range(len(pictures)):
        key = pictures.key(row)
        if key in seen:
            raise DataError(f"two pictures are called {key!r}: a search could not say which of them it found")
        seen.add(key)
        digest.update(key.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _size(reading: Reading, part: int) -> int:
    return min(reading.batch_size, len(reading.pictures) - part * reading.batch_size)


Maker = Callable[[Sequence[int]], Iterator[tuple[int, bytes]]]
"""Numbers of parts to numbers and contents, as they are done."""


def _maker(config: IndexConfig, checkpoint: str, reading: Reading, tower: PictureTower) -> Maker:
    """What makes parts where `config.runtime` says."""
    if config.runtime.kind == "local":
        return partial(_made_here, reading, tower)
    require_package("ray", "ray", "runtime.kind=ray")
    from fmray.runtime.ray_data import mapped_on_ray

    build = partial(PictureTower, checkpoint, config.runtime)
    return partial(mapped_on_ray, read=read_part, source=reading, build=build, runtime=config.runtime)


def _made_here(
    reading: Reading, tower: Callable[[bytes], bytes], todo: Sequence[int]
) -> Iterator[tuple[int, bytes]]:
    """Part after part in this process; a thread reads and decodes the next one meanwhile."""
    with ThreadPoolExecutor(1, "pictures") as reader:
        ahead = reader.submit(read_part, reading, todo[0])
        for place, part in enumerate(todo):
            content = ahead.result()
            if place + 1 < len(todo):
                ahead = reader.submit(read_part, reading, todo[place + 1])
            yield part, tower(content)


def _make_parts(
    config: IndexConfig, make: Maker, reading: Reading, parts: Workshop, done: set[int]
) -> list[tuple[str, str]] | None:
    """Make the parts that are not done: what had to be left out, in the order of the source; None where told to stop before."""
    todo = [part for part in range(reading.parts) if part not in done]
    total, left_out = len(reading.pictures), dict[int, list[tuple[str, str]]]()
    already = total - sum(_size(reading, part) for part in todo)
    bar = tqdm(total=total, initial=already, unit="picture", desc="index", disable=not config.progress)
    with stop_on_sigterm() as asked, bar:
        for part, content in make(todo) if todo else ():
            parts.put(part, content)
            left_out[part] = embedded_part(content).left_out
            entries = [entry for one in sorted(left_out) for entry in left_out[one]]
            _check_share(config, entries, total)
            bar.update(_size(reading, part))
            if asked() and len(left_out) < len(todo):
                return None
    return [entry for part in sorted(left_out) for entry in left_out[part]]


def _check_share(config: IndexConfig, left_out: Sequence[tuple[str, str]], total: int) -> None:
    """Raises DataError as soon as more pictures are unreadable than may be of all; the file names those found so far."""
    bad = len(left_out)
    if bad <= config.max_bad_share * total:
        return
    output = Path(config.output).expanduser()
    write_left_out(output, left_out)
    raise DataError(
        f"{bad} of {total} pictures cannot be used, more than max_bad_share={config.max_bad_share}; "
        f"{output / LEFT_OUT} names them; the first: {left_out[0][1]}"
    )
