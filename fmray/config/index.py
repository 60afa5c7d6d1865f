"""What becomes an index of pictures: which pictures, by which model, where it is written."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from fmray.config.base import RuntimeConfig, Section
from fmray.config.data import (
    EmojiSource,
    FolderSource,
    HubSource,
    JsonlSource,
    ParquetSource,
    WebDatasetSource,
)
from fmray.errors import ConfigError


class FilesSource(Section):
    """Every picture file under a folder, however deep; keys are paths below it, and there are no captions."""

    kind: Literal["files"] = "files"
    path: str
    """The folder. Names that start with a dot and links to folders are passed over."""


def index_source_kind(value: Any) -> str:
    """The `kind` of a source given as keys or as a section; plain files where it is not said."""
    return str(value.get("kind", "files") if isinstance(value, dict) else getattr(value, "kind", ""))


IndexSource = Annotated[
    Annotated[FilesSource, Tag("files")]
    | Annotated[EmojiSource, Tag("emoji")]
    | Annotated[HubSource, Tag("hub")]
    | Annotated[FolderSource, Tag("folder")]
    | Annotated[JsonlSource, Tag("jsonl")]
    | Annotated[ParquetSource, Tag("parquet")]
    | Annotated[WebDatasetSource, Tag("webdataset")],
    Discriminator(index_source_kind),
]


class HnswConfig(Section):
    """A graph of neighbours (Malkov and Yashunin 2016), for collections where comparing with every vector takes too long."""

    links: Annotated[int, Field(ge=4, le=256)] = 32
    """Neighbours of each vector (M); twice as many in the lowest layer."""
    build: Annotated[int, Field(ge=8, le=4096)] = 200
    """Candidates held while a vector is linked in (efConstruction)."""
    search: Annotated[int, Field(ge=8, le=4096)] = 256
    """Candidates held while a query is answered (efSearch): more finds more and takes longer."""


class IndexConfig(Section):
    """An index of pictures, embedded by a dual encoder, that `/v1/search` answers from."""

    checkpoint: str
    """A model folder, a checkpoint folder, or a run folder (its last good checkpoint)."""
    source: IndexSource
    """The pictures; `source.kind` selects where they come from, plain files where it is not said."""
    split: Literal["train", "test"] = "train"
    """Which split of a source that has splits."""
    output: str
    """Folder of the index, on a disk that the endpoint sees; a new index takes the old one's place in one step."""
    runtime: RuntimeConfig = RuntimeConfig()
    """`local`: in this process; `ray`: Ray Data with `workers` actors that hold the model, and tasks that decode."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Pictures in one forward pass, and in one file of an index half built."""
    kind: Literal["auto", "flat", "hnsw"] = "auto"
    """`flat`: every vector is compared, exact. `hnsw`: a graph, approximate. `auto`: by `hnsw_above`."""
    hnsw_above: Annotated[int, Field(ge=1)] = 200_000
    """Pictures above which `auto` takes the graph."""
    hnsw: HnswConfig = HnswConfig()
    """The graph."""
    thumbnail: Annotated[int, Field(ge=0, le=512)] = 96
    """Side of the small pictures kept for a page, in pixels; 0: none."""
    max_image_megapixels: Annotated[float, Field(gt=0)] = 40.0
    """Pixels of one picture, by its header, before it is decoded."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Unreadable pictures are left out and named in `left_out.txt`; more than this share of all ends the work."""
    progress: bool = True
    """A progress bar on the terminal."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if "://" in self.output:
            cure = "write a local folder: an endpoint reads its index from a disk; copy the finished folder where you need it"
            raise ConfigError("output", self.output, cure)
        if 0 < self.thumbnail < 8:
            raise ConfigError("thumbnail", self.thumbnail, "must be 0 or at least 8")
        return self
