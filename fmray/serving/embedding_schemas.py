"""Bodies of `/v1/embeddings` (OpenAI, Infinity, Jina, vLLM) and `/v1/classify`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, FailFast, Field, StrictBool, StrictInt

from fmray.serving.chat_schemas import Message
from fmray.serving.schemas import EXAMPLE_PICTURE, MOST_ITEMS, WHOLE, Body, Items, Strings, Text, Usage


class EmbeddingsRequest(Body):
    """Body of `POST /v1/embeddings`: either `input` or `messages`.

    Ignored: `user` and every other OpenAI field that is not listed. Vectors always have norm 1.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["input"]}, {"required": ["messages"]}],
            "examples": [
                {"model": "fmray-clip", "input": ["a red heart", EXAMPLE_PICTURE]},
                {"model": "fmray-clip", "input": "a red heart", "encoding_format": "base64", "dimensions": 4},
                {"model": "fmray-clip", "messages": [{"role": "user", "content": "a red heart"}]},
            ],
        }
    )

    model: Text
    """Id of the served model."""
    input: Items = Field(default_factory=list)
    """A text, an image as a `data:` URL, a part, or a list of these in any mixture."""
    messages: Annotated[list[Message], FailFast(), Field(max_length=MOST_ITEMS, default_factory=list)]
    """vLLM's form for one embedding: one user's message that holds a text or an image."""
    encoding_format: Literal["float", "base64"] = "float"
    """`base64`: little-endian float32, what the openai client asks for by default."""
    dimensions: Annotated[StrictInt, Field(ge=1), WHOLE] | None = None
    """Keep this many leading numbers and scale the rest to norm 1 again."""
    modality: Literal["auto", "text", "image"] = "auto"
    """What plain strings are; `auto`: an image where they are a `data:` URL (Infinity's field)."""
    truncate: StrictBool = True
    """False: a text of more tokens than the model reads is an error instead of being cut."""
    normalize: Literal[True] = True
    """Accepted for clients that send it."""


class ClassifyRequest(Body):
    """Body of `POST /v1/classify`: which of these labels fits the picture?"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "fmray-clip", "input": EXAMPLE_PICTURE, "labels": ["red heart", "blue sky"]},
                {
                    "model": "fmray-clip",
                    "input": [EXAMPLE_PICTURE],
                    "labels": ["red", "blue"],
                    "template": ["a {} square", "something {}"],
                    "top_k": 1,
                },
            ]
        }
    )

    model: Text
    """Id of the served model."""
    input: Items
    """An image or a list of images, in any of the shapes that `/v1/embeddings` takes."""
    labels: Annotated[list[Text], FailFast(), Field(max_length=MOST_ITEMS)]
    """Different, non-empty names."""
    template: Strings = Field(default=["a photo of a {}"])
    """Sentence around a label, `{}` standing for it; several: the mean of their unit vectors (ensemble)."""
    top_k: Annotated[StrictInt, Field(ge=1), WHOLE] | None = None
    """Only the best labels in `probs`; None: all."""
    multi_label: StrictBool = False
    """False: probabilities over all labels sum to 1. True: each label by itself, as a sigmoid of its logit
    (SigLIP) or of its logit less that of the label "thing" (CLIP, whose logits mean nothing alone)."""


# ---------------------------------------------------------------------------------------------------- replies


class EmbeddingObject(Body):
    """One embedding."""

    object: Literal["embedding"] = "embedding"
    index: int
    """Position in `input`."""
    embedding: list[float] | str
    """Numbers, or base64 of little-endian float32."""


class EmbeddingsReply(Body):
    """Reply of `POST /v1/embeddings`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "list",
                    "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}],
                    "model": "fmray-clip",
                    "usage": {"prompt_tokens": 5, "total_tokens": 5, "images": 0, "truncated": 0},
                }
            ]
        }
    )

    object: Literal["list"] = "list"
    data: list[EmbeddingObject]
    model: str
    usage: Usage


class LabelScore(Body):
    """A label and its probability."""

    label: str
    score: float


class Classification(Body):
    """The labels of one picture, best first."""

    index: int
    """Position in `input`."""
    label: str
    """The best one."""
    probs: list[LabelScore]


class ClassifyReply(Body):
    """Reply of `POST /v1/classify`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "list",
                    "data": [
                        {
                            "index": 0,
                            "label": "red",
                            "probs": [{"label": "red", "score": 0.9}, {"label": "blue", "score": 0.1}],
                        }
                    ],
                    "model": "fmray-clip",
                    "usage": {"prompt_tokens": 14, "total_tokens": 14, "images": 1, "truncated": 0},
                }
            ]
        }
    )

    object: Literal["list"] = "list"
    data: list[Classification]
    model: str
    usage: Usage
