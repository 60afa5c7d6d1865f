"""Dialogues made of pictures with captions: what the caption says, or questions by template about a label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from fmray.config.dialogues import CaptionSource, LabelSource
from fmray.config.schema import HubSource, ParquetSource, SourceConfig, WebDatasetSource
from fmray.data.dialogues import ListedDialogues, asked
from fmray.data.reviews import text_hash
from fmray.data.sources import Source, Split, captions_from, open_source
from fmray.errors import ConfigError, DataError
from fmray.types import Dialogue

Captioned = tuple[str, tuple[str, ...]]
"""A sample's name and its captions."""


@dataclass(frozen=True, slots=True)
class PairPictures:
    """The pictures of a source of pairs, by index: `PairPictures(source, "test/").read("test/17")`."""

    source: Source
    prefix: str

    def read(self, key: str) -> bytes:
        return self.source[int(key.removeprefix(self.prefix))].image


def open_captions(config: CaptionSource, split: Split) -> ListedDialogues:
    """A dialogue for each caption of a training picture, for the first caption of a test picture; called by the sample.

    What is asked is drawn from `prompts` by the dialogue's name. Raises DataError, ConfigError where there are no prompts.
    """
    if not config.prompts:
        raise ConfigError("data.source.prompts", [], 'give at least one; "" asks nothing')
    source, rows = captioned(config.pairs, split)
    dialogues = []
    for index, (sample, captions) in enumerate(rows):
        for place, caption in enumerate(captions if split == "train" else captions[:1]):
            name = f"{sample}#{place}" if split == "train" else sample
            prompt = _drawn(config.prompts, name)
            known = captions if split == "test" else ()
            dialogues.append(asked(name, f"{split}/{index}", prompt, caption, answers=known, kind="caption"))
    return ListedDialogues(tuple(dialogues), PairPictures(source, f"{split}/"))


def open_labels(config: LabelSource, split: Split) -> ListedDialogues:
    """Two dialogues for each picture: what it shows ("templated what"), and whether it shows a label ("templated yes/no").

    The label is the first caption. Templates, and which label is asked for, are drawn by the sample's name: half of the time
    the right one, else one of the split's others. Raises DataError, ConfigError for templates without their place.
    """
    _check_templates(config)
    source, rows = captioned(config.pairs, split)
    labels = sorted({captions[0] for _, captions in rows})
    if config.whether and len(labels) < 2:
        raise DataError(
            f"data.source.pairs: every {split} picture has the label {labels[0]!r}: nothing to ask of yes and no"
        )
    dialogues = []
    for index, (sample, captions) in enumerate(rows):
        picture = f"{split}/{index}"
        if config.what:
            question = _drawn(config.what, f"{sample} what")
            dialogues.append(asked(f"{sample} what", picture, question, captions[0], kind="templated what"))
        if config.whether:
            dialogues.append(_whether(sample, picture, captions[0], labels, config.whether))
    return ListedDialogues(tuple(dialogues), PairPictures(source, f"{split}/"))


def _check_templates(config: LabelSource) -> None:
    if not config.what and not config.whether:
        raise ConfigError("data.source.what", [], "give templates here or in data.source.whether")
    for template in config.whether:
        if template.count("{}") != 1:
            raise ConfigError("data.source.whether", template, "write {} once, where the label goes")


def _whether(
    sample: str, picture: str, label: str, labels: list[str], templates: tuple[str, ...]
) -> Dialogue:
    name = f"{sample} whether"
    right = text_hash(f"{name} right") % 2 == 0
    others = [other for other in labels if other != label]
    shown = label if right else others[text_hash(f"{name} other") % len(others)]
    question = _drawn(templates, name).replace("{}", shown)
    return asked(name, picture, question, "yes" if right else "no", kind="templated yes/no")


def _drawn(choices: tuple[str, ...], name: str) -> str:
    return choices[text_hash(name) % len(choices)]


# ------------------------------------------------------------------------------------------- captions without pictures


def captioned(config: SourceConfig, split: Split) -> tuple[Source, list[Captioned]]:
    """A source of pairs and each sample's name and captions, in order; no picture is read. Raises DataError."""
    source = open_source(config, split)
    captions = list(_captions_of(config, source))
    return source, [(source.name(index), each) for index, each in enumerate(captions)]


def _captions_of(config: SourceConfig, source: Source) -> Iterator[tuple[str, ...]]:
    """The captions of all samples in order, with no picture read; raises DataError with a sample's name."""
    if isinstance(config, HubSource):
        from fmray.data.hub import HubRows

        rows = cast(HubRows, source)
        texts = rows.dataset.select_columns([rows.caption_column])
        values = (row[rows.caption_column] for row in texts)
        yield from (captions_from(value, source.name(index)) for index, value in enumerate(values))
    elif isinstance(config, ParquetSource):
        from fmray.data.parquet import ParquetRows

        column = config.caption_column
        index = 0
        for path, group, _ in cast(ParquetRows, source).groups:
            try:
                table = pq.ParquetFile(path).read_row_group(group, columns=[column])
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
            for value in table[column].to_pylist():
                yield captions_from(value, source.name(index))
                index += 1
    elif isinstance(config, WebDatasetSource):
        from fmray.data.webdataset import TarSamples

        tar = cast(TarSamples, source)
        # The text member stands in for the picture's, so that reading a sample reads no picture.
        texts_alone = replace(tar, samples=tuple((shard, text, text) for shard, _, text in tar.samples))
        yield from (texts_alone[index].captions for index in range(len(texts_alone)))
    else:
        from fmray.data.emoji import EmojiPictures
        from fmray.data.files import PictureFiles

        listed = cast(EmojiPictures | PictureFiles, source)
        yield from (captions for _, captions in listed.samples)
