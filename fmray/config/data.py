"""Where image-text pairs come from and how they are cut into batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from fmray.config.base import Section


class EmojiSource(Section):
    """Noto and Twemoji pictures with their names, split by concept (pinned assets, no hub needed)."""

    kind: Literal["emoji"] = "emoji"
    languages: tuple[Literal["en", "ko", "ja", "zh", "de", "fr", "es", "it", "pt"], ...] = ("en",)
    """Languages of the names; a training caption is drawn from them."""
    vendors: tuple[Literal["noto", "twemoji"], ...] = ("noto", "twemoji")
    """Art to train on: Noto (Apache-2.0), Twemoji (CC-BY 4.0)."""
    variants: bool = False
    """Also the skin-tone and gender variants of a training concept."""
    aliases: bool = True
    """Also the short aliases (`:thumbs_up:`) of an emoji as English captions."""


class HubSource(Section):
    """A dataset of the Hugging Face hub or a local `datasets` folder."""

    kind: Literal["hub"] = "hub"
    path: str
    """Hub id or local folder, as for `datasets.load_dataset`."""
    config_name: str | None = None
    """The dataset's configuration, where it has several."""
    image_column: str = "image"
    """Column with the picture."""
    caption_column: str = "caption"
    """Column with one caption or a list of captions."""
    train_split: str = "train"
    """Split to train on; slices (`train[:90%]`) work."""
    test_split: str = "test"
    """Split to evaluate on."""


class FolderSource(Section):
    """Pictures in folders named after their captions: `<path>/<split>/<caption>/picture.png`."""

    kind: Literal["folder"] = "folder"
    path: str
    """Folder that holds the splits, or the caption folders themselves."""
    template: str = "a photo of a {}"
    """Sentence around the folder's name (underscores become spaces)."""


class JsonlSource(Section):
    """Lines of `{"image": "relative/path.jpg", "caption": "…" | ["…", …]}` in `<path>/<split>.jsonl`."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """Folder with `train.jsonl` and `test.jsonl`; image paths are relative to it."""
    image_key: str = "image"
    """Key of the picture's path."""
    caption_key: str = "caption"
    """Key of the caption or captions."""


class ParquetSource(Section):
    """Parquet files `<path>/<split>*.parquet` with an image column (bytes or {bytes, path}) and a caption column."""

    kind: Literal["parquet"] = "parquet"
    path: str
    """Folder with the files."""
    image_column: str = "image"
    """Column with the encoded picture."""
    caption_column: str = "caption"
    """Column with one caption or a list of captions."""


class WebDatasetSource(Section):
    """Tar shards `<path>/<split>*.tar` of `key.jpg|png|webp` beside `key.txt|json` (webdataset layout)."""

    kind: Literal["webdataset"] = "webdataset"
    path: str
    """Folder with the shards."""
    caption_key: str = "caption"
    """Key of the caption where the text member is JSON."""


def source_kind(value: Any) -> str:
    """The `kind` of a source given as keys or as a section; the emoji pairs where it is not said."""
    return str(value.get("kind", "emoji") if isinstance(value, dict) else getattr(value, "kind", ""))


SourceConfig = Annotated[
    Annotated[EmojiSource, Tag("emoji")]
    | Annotated[HubSource, Tag("hub")]
    | Annotated[FolderSource, Tag("folder")]
    | Annotated[JsonlSource, Tag("jsonl")]
    | Annotated[ParquetSource, Tag("parquet")]
    | Annotated[WebDatasetSource, Tag("webdataset")],
    Discriminator(source_kind),
]

SOURCE_KINDS = ("emoji", "hub", "folder", "jsonl", "parquet", "webdataset")


class AugmentConfig(Section):
    """Random changes of a training picture; all zero and False: none."""

    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of a horizontal mirror image."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in degrees."""
    translate: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift, as a share of the side."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of size: 0.2 draws from 0.8 to 1.25."""
    color: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest relative change of brightness, contrast and saturation."""

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return any((self.flip, self.rotate, self.translate, self.scale, self.color))


class DataConfig(Section):
    """What is read, how it is cut into batches."""

    source: SourceConfig = EmojiSource()
    """The data set; `data.source.kind` selects its type."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Samples per optimizer step over all workers together."""
    decode_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read and decode for each learner; 0: in the learner's own."""
    cache_decoded: Annotated[int, Field(ge=0)] = 512
    """MiB of decoded pictures that each process keeps in memory; 0: decode each time."""
    max_tokens: Annotated[int, Field(ge=2)] = 32
    """Longer captions are truncated to this many tokens."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of the training pictures."""
    background: Literal["white", "random"] = "white"
    """What stands behind transparent pixels while training; evaluation always takes white."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Unreadable pictures are skipped and counted; more than this share of those read stops the run, by name."""
