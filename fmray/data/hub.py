"""Datasets of the Hugging Face hub, and folders written by `datasets`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from fmray.config.schema import HubSource
from fmray.data.sources import Split, captions_from, picture_from, require_columns, some
from fmray.errors import DataError
from fmray.types import ImageText


@dataclass(frozen=True, slots=True)
class HubRows:
    """Rows of a dataset, called `<path>[<split>]#<row>`; the pictures stay in its memory-mapped files."""

    title: str
    dataset: Any
    image_column: str
    caption_column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> ImageText:
        name, row = self.name(index), self.dataset[index]
        picture = picture_from(row[self.image_column], Path(), name)
        return ImageText(name, picture, captions_from(row[self.caption_column], name))

    def name(self, index: int) -> str:
        return f"{self.title}#{index}"


def open_hub(config: HubSource, split: Split) -> HubRows:
    """One split of a hub dataset, a folder of data files, or a folder written by `save_to_disk`.

    Raises DataError where it cannot be loaded (offline, unknown, no such split) or lacks a column.
    """
    wanted = config.train_split if split == "train" else config.test_split
    loaded = load_split(config.path, config.config_name, wanted, key="data.source.path")
    require_columns(config, loaded.column_names, config.path)
    rows = loaded.select_columns([config.image_column, config.caption_column])
    if isinstance(rows.features[config.image_column], datasets.Image):
        rows = rows.cast_column(
            config.image_column, datasets.Image(decode=False)
        )  # we decode, with our limits
    return HubRows(f"{config.path}[{wanted}]", rows, config.image_column, config.caption_column)


def load_split(path: str, config_name: str | None, wanted: str, *, key: str) -> Any:
    """One split of a dataset with at least one row; raises DataError that names `key` and the path."""
    try:
        loaded = _load(path, config_name, wanted)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split())[:300]
        raise DataError(f"{key}={path!r}: split '{wanted}' cannot be loaded ({said})") from None
    if not len(loaded):
        raise DataError(f"{key}={path!r}: split '{wanted}' has no rows")
    return loaded


def _load(path: str, config_name: str | None, wanted: str) -> Any:
    folder = Path(path).expanduser()
    if not (folder / "dataset_dict.json").is_file() and not (folder / "state.json").is_file():
        return datasets.load_dataset(path, config_name, split=wanted)
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    base = re.split(r"[\[(]", wanted)[0]
    if base not in splits:
        raise ValueError(f"there are the splits {some(sorted(splits))}")
    sizes = {name: len(rows) for name, rows in splits.items()}
    (part,) = datasets.ReadInstruction.from_spec(wanted).to_absolute(sizes)
    return splits[part.splitname].select(range(part.from_, part.to))
