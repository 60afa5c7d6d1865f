"""Where samples come from: one protocol, six kinds of storage.

A source is random access to encoded pictures with their captions. Opening it checks what is cheap to check
(paths, columns, which captions belong to which pictures); the pictures stay where they are. It can be pickled
into decoding processes. A sample that cannot be used raises `DataError` with its name when it is read.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal, Protocol

from fmray.assets import fetch
from fmray.config.schema import (
    EmojiSource,
    FolderSource,
    HubSource,
    ParquetSource,
    SourceConfig,
    WebDatasetSource,
)
from fmray.errors import DataError
from fmray.types import ImageText

Split = Literal["train", "test"]
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
"""Files that are taken for pictures, in any case."""


class Source(Protocol):
    """Random access to image-text samples; picklable."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> ImageText:
        """One sample, read now; raises DataError where it is damaged, IndexError past the end."""

    def name(self, index: int) -> str:
        """`self[index].name`, without reading the picture."""


def open_source(config: SourceConfig, split: Split) -> Source:
    """The samples of one split, at least one; raises DataError in one line (AssetError for pinned data)."""
    # Imported here so that one kind does not pay for the libraries of the others.
    if isinstance(config, EmojiSource):
        from fmray.data.emoji import open_emoji

        return open_emoji(config, split)
    if isinstance(config, HubSource):
        from fmray.data.hub import open_hub

        return open_hub(config, split)
    if isinstance(config, ParquetSource):
        from fmray.data.parquet import open_parquet

        return open_parquet(config, split)
    if isinstance(config, WebDatasetSource):
        from fmray.data.webdataset import open_webdataset

        return open_webdataset(config, split)
    from fmray.data.files import open_folder, open_jsonl

    return open_folder(config, split) if isinstance(config, FolderSource) else open_jsonl(config, split)


# ------------------------------------------------------------------------------------------ shared checks


def data_folder(path: str, key: str = "data.source.path") -> Path:
    """The folder that a key names; `asset:groceries` is a pinned asset. Raises DataError."""
    if path.startswith("asset:"):
        return fetch(path.removeprefix("asset:"))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{key}={path!r}: is a file; name the folder that holds the data")
    beside = (
        [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    )
    close = difflib.get_close_matches(folder.name, beside, n=1)
    hint = f"; did you mean {str(folder.parent / close[0])!r}?" if close else ""
    raise DataError(f"{key}={path!r}: no such folder{hint}")


def split_files(folder: Path, split: Split, suffix: str) -> list[Path]:
    """`<folder>/<split>*<suffix>`, sorted; raises DataError that says what is there."""
    found = sorted(path for path in folder.glob(f"{split}*{suffix}") if path.is_file())
    if not found:
        there = some(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise DataError(f"data.source.path={str(folder)!r}: holds no {split}*{suffix}; there is {there}")
    return found


def read_picture(path: Path, name: str) -> bytes:
    """A file's bytes; raises DataError where it has gone or may not be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: {path} cannot be read ({error.strerror})") from None


def captions_from(value: object, where: str) -> tuple[str, ...]:
    """One caption or a list of them as a tuple without blanks; raises DataError if none is left."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where}: the caption must be a string or a list of strings, not {type(value).__name__}"
        )
    captions = tuple(stripped for text in texts if (stripped := text.strip()))
    if not captions:
        raise DataError(f"{where}: the picture has no caption")
    return captions


def some(names: list[str], limit: int = 5) -> str:
    """`a, b, c and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def require_columns(config: HubSource | ParquetSource, there: list[str], where: object) -> None:
    """Raises DataError, which names the columns there are, if the picture's or the caption's is missing."""
    for key, column in (("image_column", config.image_column), ("caption_column", config.caption_column)):
        if column not in there:
            columns = some(sorted(there), 12)
            raise DataError(f"data.source.{key}={column!r}: {where} has no such column; there are {columns}")


def picture_from(value: object, folder: Path, where: str) -> bytes:
    """The encoded picture in a cell: bytes, or `{"bytes": …, "path": …}`, the path relative to the folder."""
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes") or (read_picture(folder / path, where) if isinstance(path, str) else None)
    if not isinstance(value, bytes):
        raise DataError(f"{where}: the picture must be encoded bytes, not {type(value).__name__}")
    return value
