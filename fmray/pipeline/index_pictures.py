"""The pictures of an index with their keys: plain files, or any of the data sources."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fmray.config.data import HubSource
from fmray.config.index import FilesSource, IndexConfig
from fmray.data.sources import PICTURE_SUFFIXES, Source, data_folder, open_source, read_picture
from fmray.errors import DataError


class KeyedPictures(Protocol):
    """Random access to encoded pictures; picklable."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """What a search calls the picture."""
        ...

    def read(self, row: int) -> tuple[bytes, tuple[str, ...]]:
        """The encoded picture and its captions; raises DataError where it cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class PictureTree:
    """Picture files under a folder: `PictureTree(Path("photos"), ("2024/a.jpg", "2024/b.jpg"))`, without captions."""

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def key(self, row: int) -> str:
        return self.names[row]

    def read(self, row: int) -> tuple[bytes, tuple[str, ...]]:
        return read_picture(self.root / self.names[row], self.names[row]), ()


@dataclass(frozen=True, slots=True)
class SourcePictures:
    """A data source's samples under their own names."""

    source: Source
    cut: str = ""
    """A beginning that every name has, which says where on this machine the data lie; keys go without it."""

    def __len__(self) -> int:
        return len(self.source)

    def key(self, row: int) -> str:
        return self.source.name(row).removeprefix(self.cut)

    def read(self, row: int) -> tuple[bytes, tuple[str, ...]]:
        sample = self.source[row]
        return sample.image, sample.captions


def open_pictures(config: IndexConfig) -> KeyedPictures:
    """The pictures that a configuration names, at least one; raises DataError."""
    source = config.source
    if isinstance(source, FilesSource):
        root = data_folder(source.path, "source.path")
        names = tuple(_picture_names(root))
        if not names:
            kinds = ", ".join(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
            raise DataError(f"source.path={source.path!r}: holds no picture file ({kinds})")
        return PictureTree(root, names)
    return SourcePictures(
        open_source(source, config.split),
        _before_the_last(source.path) if isinstance(source, HubSource) else "",
    )


def _before_the_last(path: str) -> str:
    """What stands before a local folder's own name, `"/data/"` of `"/data/pets"`; nothing of a hub's `owner/name`."""
    return f"{path.rpartition('/')[0]}/" if "/" in path and Path(path).expanduser().exists() else ""


def _picture_names(root: Path) -> Iterator[str]:
    """Paths below the folder, folder by folder in the order of their names."""
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        below = Path(folder).relative_to(root)
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES):
                yield (below / name).as_posix()
