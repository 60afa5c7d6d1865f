"""What a served model is to HTTP: asks in, replies out; prepared one by one, answered in batches."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch

from fmray.errors import RequestError

Value = TypeVar("Value")
Ask = TypeVar("Ask")
Item = TypeVar("Item")
Reply = TypeVar("Reply", covariant=True)

Kind = Literal["clip", "vqa", "mllm"]
KINDS: dict[Kind, str] = {
    "clip": "a dual encoder (CLIP)",
    "vqa": "a VQA model",
    "mllm": "a multimodal LLM",
}
"""Kinds of models, as a person is told of them."""

MODEL_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)
"""What a model can raise: torch's own errors are RuntimeErrors."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the same would go with fewer items; frees what the GPU's allocator keeps for itself."""
    # the CPU allocator raises a plain RuntimeError
    out = isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)
    if out and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a client may know of any model.

    `Capabilities(kind="vqa", modalities=("text", "image"), output="text", max_tokens=32, image_size=96)`
    """

    kind: Kind
    modalities: tuple[str, ...]
    """What it reads."""
    output: Literal["embedding", "text"]
    """What it makes of that."""
    max_tokens: int
    """Tokens of a text, or of a whole conversation."""
    image_size: int
    """Side of the square that a picture becomes."""


@dataclass(frozen=True, slots=True)
class Prepared(Generic[Value]):
    """An ask as tensors. `Prepared(pixels_CHW, bucket="image", size=150_528)`"""

    value: Value
    bucket: Hashable
    """Only items of one bucket share a batch: pictures; texts of about one length."""
    size: int
    """Bytes it holds while it waits."""


class BatchEngine(Protocol[Ask, Item, Reply]):
    """A model that answers each batch with one forward pass."""

    @property
    def max_batch(self) -> int:
        """Items that `forward` takes at once."""
        ...

    @property
    def probe(self) -> Ask:
        """A synthetic ask that every healthy model answers."""
        ...

    def prepare(self, ask: Ask) -> Prepared[Item]:
        """Decode or tokenise one, on the CPU, in any thread; raises RequestError that names the ask."""
        ...

    def collate(self, items: Sequence[Item]) -> Any:
        """Items of one bucket as a batch, in any thread."""
        ...

    def forward(self, batch: Any) -> Sequence[Reply | RequestError]:
        """The model, one call at a time: one reply per item in order, an error for an item that it cannot answer."""
        ...
