"""Parquet files: an index of row groups, and a small cache of those read last."""

from __future__ import annotations

import bisect
import itertools
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmray.config.schema import ParquetSource
from fmray.data.sources import Split, captions_from, data_folder, picture_from, require_columns, split_files
from fmray.errors import DataError
from fmray.types import ImageText

CACHE_BYTES = 256 * 2**20
"""Decoded row groups that each process keeps."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ParquetRows:
    """Rows of parquet files, called `<file>#<row>`.

    To read one row its whole row group is decoded: groups of some hundred rows suit shuffled reading.
    """

    folder: Path
    groups: tuple[tuple[Path, int, int], ...]
    """File, row group, first row of the group within the file."""
    starts: tuple[int, ...]
    """Index of each group's first sample; one more entry than groups."""
    image_column: str
    caption_column: str
    _cache: OrderedDict[int, Any] = field(default_factory=OrderedDict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> ImageText:
        name, (group, row) = self.name(index), self._locate(index)
        table = self._table(group, name)
        picture = picture_from(table[self.image_column][row].as_py(), self.folder, name)
        return ImageText(name, picture, captions_from(table[self.caption_column][row].as_py(), name))

    def name(self, index: int) -> str:
        group, row = self._locate(index)
        path, _, first = self.groups[group]
        return f"{path.name}#{first + row}"

    def __getstate__(self) -> dict[str, Any]:
        keep = ("folder", "groups", "starts", "image_column", "caption_column")
        return {name: getattr(self, name) for name in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._cache = OrderedDict()

    def _locate(self, index: int) -> tuple[int, int]:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect.bisect_right(self.starts, index) - 1
        return group, index - self.starts[group]

    def _table(self, group: int, name: str) -> Any:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        path, number, _ = self.groups[group]
        columns = [self.image_column, self.caption_column]
        try:
            table = pq.ParquetFile(path).read_row_group(number, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{name}: {path} cannot be read ({str(error).splitlines()[0]})") from None
        self._cache[group] = table
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return table


def open_parquet(config: ParquetSource, split: Split) -> ParquetRows:
    """The rows of `<path>/<split>*.parquet`; raises DataError for a damaged file or a missing column."""
    folder = data_folder(config.path)
    groups: list[tuple[Path, int, int]] = []
    sizes: list[int] = []
    decoded = 0
    for path in split_files(folder, split, ".parquet"):
        try:
            metadata = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: is not a readable parquet file ({str(error).splitlines()[0]})"
            ) from None
        there = metadata.schema.to_arrow_schema().names
        require_columns(config, there, path)
        rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        groups += [
            (path, number, first) for number, first in enumerate(itertools.accumulate([0, *rows[:-1]]))
        ]
        sizes += rows
        decoded += sum(
            metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)
        )
    if not sum(sizes):
        raise DataError(f"data.source.path={config.path!r}: the {split} parquet files have no rows")
    if decoded > CACHE_BYTES and decoded / len(groups) > CACHE_BYTES / 16:
        advice = "write them with row_group_size=256 for faster shuffled reading"
        _log.warning("%s: row groups of %d MB; %s", folder, decoded / len(groups) / 1e6, advice)
    return ParquetRows(
        folder, tuple(groups), (0, *itertools.accumulate(sizes)), config.image_column, config.caption_column
    )
