"""Bodies of `/v1/rerank` (Cohere, Jina) and `/v1/score` (vLLM)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt

from fmray.serving.schemas import Body, Item, Items, Text, Usage


class RerankRequest(Body):
    """Body of `POST /v1/rerank`: which of these documents fit the query best?"""

    model: Text
    """Id of the served model."""
    query: Item
    """A text or a picture."""
    documents: Items
    """Texts and pictures in any mixture."""
    top_n: Annotated[StrictInt, Field(ge=1)] | None = None
    """Only the best; None: all."""
    return_documents: StrictBool = False
    """Texts come back beside their scores; pictures do not."""


class RankedDocument(Body):
    """A document that comes back."""

    text: str


class RankedResult(Body):
    """One document's place."""

    index: int
    """Position in `documents`."""
    relevance_score: float
    """Cosine of query and document, -1 to 1. Between a text and a picture it is far smaller than between two texts."""
    document: RankedDocument | None = None


class RerankReply(Body):
    """Reply of `POST /v1/rerank`, best first; equals keep their order."""

    object: Literal["list"] = "list"
    results: list[RankedResult]
    model: str
    usage: Usage


class ScoreRequest(Body):
    """Body of `POST /v1/score`: how alike are these pairs?"""

    model: Text
    """Id of the served model."""
    text_1: Items
    """One item, which is compared with each of `text_2`, or as many as there. Pictures may stand there too."""
    text_2: Items
    """What it is compared with."""


class Score(Body):
    """One pair."""

    index: int
    object: Literal["score"] = "score"
    score: float
    """Cosine, -1 to 1."""


class ScoreReply(Body):
    """Reply of `POST /v1/score`."""

    object: Literal["list"] = "list"
    data: list[Score]
    model: str
    usage: Usage
