"""Tar shards in webdataset's layout: members of one sample share the name up to the first dot.

The headers are read once when the shards are opened; samples are then read by offset, in any order.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fmray.config.schema import WebDatasetSource
from fmray.data.sources import PICTURE_SUFFIXES, Split, captions_from, data_folder, some, split_files
from fmray.errors import DataError
from fmray.types import ImageText

TEXT_SUFFIXES = (".txt", ".json")
"""Members that hold the caption; the first that is there counts."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's bytes lie in its shard: `Member("000017.jpg", 1536, 20480)`."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarSamples:
    """Samples of tar shards, called `<shard>/<picture member>`."""

    samples: tuple[tuple[Path, Member, Member], ...]
    """Shard, picture, text."""
    caption_key: str

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> ImageText:
        shard, picture, text = self.samples[index]
        name = self.name(index)
        try:
            with shard.open("rb") as stream:
                encoded, caption = _read(stream, picture), _read(stream, text)
        except OSError as error:
            raise DataError(f"{name}: {shard} cannot be read ({error.strerror})") from None
        return ImageText(name, encoded, self._captions(text.name, caption, name))

    def name(self, index: int) -> str:
        shard, picture, _ = self.samples[index]
        return f"{shard.name}/{picture.name}"

    def _captions(self, member: str, content: bytes, name: str) -> tuple[str, ...]:
        try:
            text = content.decode("utf-8")
            value = json.loads(text) if member.lower().endswith(".json") else {self.caption_key: text}
        except ValueError as error:  # wrong JSON or wrong UTF-8
            raise DataError(f"{name}: {member} cannot be read ({error})") from None
        if not isinstance(value, dict) or self.caption_key not in value:
            there = some(sorted(value)) if isinstance(value, dict) else type(value).__name__
            raise DataError(f"{name}: {member} has no key '{self.caption_key}'; there is {there}")
        return captions_from(value[self.caption_key], name)


def _read(stream: IO[bytes], member: Member) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.size)


def open_webdataset(config: WebDatasetSource, split: Split) -> TarSamples:
    """The samples of `<path>/<split>*.tar`; text members are `.txt` (one caption) or `.json`.

    Raises DataError for a truncated or compressed shard, pictures without text (counted, the first named),
    and shards without pictures. Members of other kinds are left alone.
    """
    folder = data_folder(config.path)
    samples: list[tuple[Path, Member, Member]] = []
    without_text: list[str] = []
    for shard in split_files(folder, split, ".tar"):
        for key, members in _by_sample(shard).items():
            picture = next((members[suffix] for suffix in PICTURE_SUFFIXES if suffix in members), None)
            text = next((members[suffix] for suffix in TEXT_SUFFIXES if suffix in members), None)
            if picture is None:
                continue
            if text is None:
                without_text.append(f"{shard.name}/{key}")
            else:
                samples.append((shard, picture, text))
    if without_text:
        count, first = len(without_text), some(without_text)
        raise DataError(
            f"data.source.path={config.path!r}: {count} pictures have no .txt or .json beside them: {first}"
        )
    if not samples:
        raise DataError(f"data.source.path={config.path!r}: the {split} shards hold no pictures")
    return TarSamples(tuple(samples), config.caption_key)


def _by_sample(shard: Path) -> dict[str, dict[str, Member]]:
    """The members of a shard by sample key, then by suffix in lower case."""
    found: dict[str, dict[str, Member]] = {}
    size = shard.stat().st_size
    try:
        with tarfile.open(
            shard, mode="r:"
        ) as archive:  # ":" refuses compression, which has no offsets to read at
            for info in archive:
                folder, _, file = info.name.rpartition("/")
                stem, dot, rest = file.partition(".")
                if not info.isfile() or not stem:
                    continue
                if info.offset_data + info.size > size:
                    raise DataError(f"{shard}: is truncated in member {info.name}")
                key = f"{folder}/{stem}" if folder else stem
                member = Member(info.name, info.offset_data, info.size)
                found.setdefault(key, {})[(dot + rest).lower()] = member
    except tarfile.TarError as error:
        raise DataError(f"{shard}: is truncated or no plain tar file ({error})") from None
    return found
