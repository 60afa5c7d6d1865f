"""Bodies of `/v1/rerank` (Cohere, Jina) and `/v1/score` (vLLM)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictInt

from fmray.serving.schemas import EXAMPLE_PICTURE, WHOLE, Body, Item, Items, Text, Usage


class RerankRequest(Body):
    """Body of `POST /v1/rerank`: which of these documents fit the query best?"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "fmray-clip",
                    "query": "something red",
                    "documents": ["a red heart", {"text": "a blue sky"}, {"image": EXAMPLE_PICTURE}],
                    "top_n": 2,
                    "return_documents": True,
                }
            ]
        }
    )

    model: Text
    """Id of the served model."""
    query: Item
    """A text or a picture."""
    documents: Items
    """Texts and pictures in any mixture."""
    top_n: Annotated[StrictInt, Field(ge=1), WHOLE] | None = None
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

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "list",
                    "results": [
                        {"index": 0, "relevance_score": 0.83, "document": {"text": "a red heart"}},
                        {"index": 2, "relevance_score": 0.27, "document": None},
                    ],
                    "model": "fmray-clip",
                    "usage": {"prompt_tokens": 14, "total_tokens": 14, "images": 1, "truncated": 0},
                }
            ]
        }
    )

    object: Literal["list"] = "list"
    results: list[RankedResult]
    model: str
    usage: Usage


class ScoreRequest(Body):
    """Body of `POST /v1/score`: how alike are these pairs?"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "fmray-clip",
                    "text_1": "something red",
                    "text_2": ["a red heart", {"image": EXAMPLE_PICTURE}],
                }
            ]
        }
    )

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

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "list",
                    "data": [{"index": 0, "object": "score", "score": 0.83}],
                    "model": "fmray-clip",
                    "usage": {"prompt_tokens": 9, "total_tokens": 9, "images": 0, "truncated": 0},
                }
            ]
        }
    )

    object: Literal["list"] = "list"
    data: list[Score]
    model: str
    usage: Usage
