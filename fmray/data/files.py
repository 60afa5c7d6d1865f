"""Pictures that are files of their own: caption folders, and JSON lines that name them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmray.config.schema import FolderSource, JsonlSource
from fmray.data.sources import PICTURE_SUFFIXES, Split, captions_from, data_folder, read_picture, some
from fmray.errors import ConfigError, DataError
from fmray.types import ImageText

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PictureFiles:
    """Files under a folder with their captions: `PictureFiles(root, (("dog/1.png", ("a dog",)), …))`."""

    root: Path
    samples: tuple[tuple[str, tuple[str, ...]], ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> ImageText:
        name, captions = self.samples[index]
        return ImageText(name, read_picture(self.root / name, name), captions)

    def name(self, index: int) -> str:
        return self.samples[index][0]


# ------------------------------------------------------------------------------------------ folders


def open_folder(config: FolderSource, split: Split) -> PictureFiles:
    """`<path>/<split>/<caption>/picture.png`, or `<path>/<caption>/picture.png` where no folder is a split.

    Samples are called `<caption>/picture.png`. Raises DataError where there are no pictures, or some lie
    outside the caption folders; ConfigError for a template without its place.
    """
    if config.template.count("{}") != 1:
        raise ConfigError(
            "data.source.template", config.template, "write {} once, where the folder's name goes"
        )
    root = _split_folder(data_folder(config.path), split)
    stray = sorted(path.name for path in root.iterdir() if _is_picture(path))
    if stray:
        raise DataError(f"{root}: {len(stray)} pictures lie in no caption folder: {some(stray)}")
    samples: list[tuple[str, tuple[str, ...]]] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        entries = sorted(folder.iterdir())
        pictures = [path.name for path in entries if _is_picture(path)]
        if len(pictures) < len(entries):
            others = some([path.name for path in entries if not _is_picture(path)])
            _log.warning("%s: not taken, as they are no picture files: %s", folder, others)
        if not pictures:
            _log.warning("%s: the caption folder holds no picture", folder)
        caption = config.template.replace("{}", folder.name.replace("_", " ").strip())
        samples += [(f"{folder.name}/{picture}", (caption,)) for picture in pictures]
    if not samples:
        kinds = ", ".join(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
        raise DataError(f"data.source.path={config.path!r}: no pictures ({kinds}) in folders under {root}")
    return PictureFiles(root, tuple(samples))


def _split_folder(folder: Path, split: Split) -> Path:
    splits = sorted(name for name in ("train", "test") if (folder / name).is_dir())
    if not splits:
        _log.warning("%s: has no train and test folders, so every split is the whole of it", folder)
        return folder
    if split not in splits:
        raise DataError(
            f"data.source.path={str(folder)!r}: has a folder '{splits[0]}' and none for '{split}'"
        )
    return folder / split


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()


# ------------------------------------------------------------------------------------------ JSON lines


def open_jsonl(config: JsonlSource, split: Split) -> PictureFiles:
    """`<path>/<split>.jsonl`, one picture per line; samples are called by their path in it.

    Raises DataError with file and line for what is not a JSON object, lacks a key or names a picture file
    that is not there; lines without a caption are counted.
    """
    root = data_folder(config.path)
    listing = root / f"{split}.jsonl"
    samples: list[tuple[str, tuple[str, ...]]] = []
    without_caption: list[str] = []
    keys: set[str] = set()
    for number, row in json_lines(listing, "data.source.path"):
        where = f"{listing}:{number}"
        picture = json_value(row, config.image_key, where)
        if not isinstance(picture, str) or not (root / picture).is_file():
            raise DataError(f"{where}: there is no picture file {picture!r} under {root}")
        if not row.get(config.caption_key):
            without_caption.append(str(number))
            keys |= set(row)
            continue
        samples.append((picture, captions_from(row[config.caption_key], where)))
    if without_caption:
        missing = f"{len(without_caption)} lines have no caption under '{config.caption_key}'"
        raise DataError(
            f"{listing}: {missing}: lines {some(without_caption)}; their keys: {some(sorted(keys))}"
        )
    if not samples:
        raise DataError(f"{listing}: is empty")
    return PictureFiles(root, tuple(samples))


def json_lines(listing: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that is not blank; raises DataError where there is no such file or no object."""
    folder = listing.parent
    if not listing.is_file():
        there = some(sorted(path.name for path in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise DataError(f"{key}={str(folder)!r}: holds no {listing.name}; there is {there}")
    with listing.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _json_object(line, f"{listing}:{number}")


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: wrong JSON or wrong UTF-8
        raise DataError(f"{where}: is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object with keys, not {type(row).__name__}")
    return row


def json_value(row: dict[str, Any], key: str, where: str) -> Any:
    """The value of a key; raises DataError that names the keys there are."""
    if key not in row:
        raise DataError(f"{where}: has no key '{key}'; there are {some(sorted(row))}")
    return row[key]
