"""HTTP bodies of the search among indexed pictures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StrictInt

from fmray.serving.schemas import WHOLE, Body, Item, Text, Usage

MOST_HITS = 100
MOST_CAPTIONS = 1000


class SearchFilter(Body):
    """Which pictures to search among; a key that is not listed here is an error, as ignoring it would show everything."""

    model_config = ConfigDict(extra="forbid")

    prefix: Text | None = None
    """Only pictures whose id starts with this: `holiday/2024/`."""
    caption: Text | Annotated[list[Text], Field(max_length=MOST_CAPTIONS)] | None = None
    """Only pictures that have exactly this caption, or one of these."""


class SearchRequest(Body):
    """Body of `POST /v1/search`: which of the indexed pictures are nearest to a text or a picture?"""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "a red heart", "top_k": 5, "include": ["thumbnails"]}]}
    )

    query: Item
    """A text, an image as a `data:` URL, or a part, in any of the shapes that `/v1/embeddings` takes."""
    model: Text | None = None
    """Id of the model that made the index; may be left out."""
    index: Text | None = None
    """Name of the index (`GET /v1/indexes`); may be left out where there is one."""
    top_k: Annotated[StrictInt, Field(ge=1, le=MOST_HITS), WHOLE] = 10
    """How many pictures at most."""
    filter: SearchFilter | None = None
    """Search among some of the pictures only."""
    include: Annotated[tuple[Literal["thumbnails"], ...], Field(max_length=8)] = ()
    """`thumbnails`: small pictures too, as `data:` URLs, where the index has them."""


class SearchHit(Body):
    """One found picture."""

    index: int
    """Its place: 0 is the nearest."""
    id: str
    """Its key: a file's path below the indexed folder, or a record's name."""
    score: float
    """Cosine of its vector and the query's, -1 to 1."""
    caption: str | None = None
    """Its first caption, where it has one."""
    thumbnail: str | None = None
    """`data:image/jpeg;base64,…`, where it was asked for and the index has one."""


class SearchReply(Body):
    """Reply of `POST /v1/search`, nearest first."""

    object: Literal["list"] = "list"
    data: list[SearchHit]
    index: str
    """Name of the index."""
    model: str
    usage: Usage


class IndexObject(Body):
    """A served index."""

    id: str
    """Its name in requests."""
    object: Literal["index"] = "index"
    created: int
    """Seconds since 1970 at which it was built."""
    count: int
    """Pictures."""
    dim: int
    """Width of their vectors."""
    kind: Literal["flat", "hnsw"]
    """`flat`: exact; `hnsw`: approximate."""
    thumbnails: bool
    """Whether it has small pictures."""
    checkpoint: str
    """The first 12 digits of the content hash of the model that made it."""


class IndexList(Body):
    """Reply of `GET /v1/indexes`."""

    object: Literal["list"] = "list"
    data: list[IndexObject]
