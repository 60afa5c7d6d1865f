"""A dual encoder behind an endpoint: texts and images to vectors of one space.

N, B rows of a batch  T tokens  C,H,W pixels  D width of the shared space
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fmray.errors import CheckpointError, RequestError
from fmray.models.saved import LoadedDualEncoder
from fmray.serving.asks import Ask, ImageAsk, TextAsk
from fmray.serving.engines import BatchEngine, Capabilities, Prepared
from fmray.serving.images import pixels_of_one

NOT_FINITE = "the model's answer to this item is not a number: its weights or its arithmetic are damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingCapabilities(Capabilities):
    """Those of a dual encoder: what its scores are made of too."""

    dim: int
    """Width D of an embedding."""
    logit_scale: float
    """A cosine times this, plus the bias, is a logit."""
    logit_bias: float | None
    """None: trained with a softmax over pairs (CLIP). A number: with a sigmoid per pair (SigLIP)."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """What one text or image became."""

    vector_D: Tensor
    """float32 on the CPU, norm 1."""
    tokens: int
    """Tokens of a text; 0 for an image."""
    truncated: bool
    """The text had more tokens than the model reads."""


@dataclass(frozen=True, slots=True)
class TextItem:
    """A text's ids and whether it was cut."""

    ids: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True, slots=True)
class ClipBatch:
    """Rows of one kind: pictures, or texts."""

    pixels_BCHW: Tensor | None = None
    """uint8."""
    token_ids_BT: Tensor | None = None
    mask_BT: Tensor | None = None
    """int64, 1 at real tokens."""
    truncated: tuple[bool, ...] = ()
    """Per text."""


ClipItem = Tensor | TextItem
"""uint8 pixels [3, S, S], or a text."""


class EmbeddingEngine(BatchEngine[Ask, Any, Embedding], Protocol):
    """What `/v1/embeddings` and its relatives need."""

    @property
    def capabilities(self) -> EmbeddingCapabilities: ...

    def warmup(self) -> None:
        """Raises CheckpointError where the model's numbers are not finite."""
        ...


class ClipEngine:
    """A dual encoder: pictures through one tower, texts of about one length through the other."""

    max_batch = 32

    def __init__(self, loaded: LoadedDualEncoder, *, max_pixels: int) -> None:
        self._loaded = loaded
        self._max_pixels = max_pixels
        self._device = next(loaded.model.parameters()).device
        # a copy that nobody changes: cutting and padding are states of a tokenizer, and many threads ask this one
        self._tokenizer = Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(loaded.max_tokens)
        with torch.inference_mode():
            scale, bias = loaded.model.logit_scale_and_bias()
        self.capabilities = EmbeddingCapabilities(
            kind="clip",
            modalities=("text", "image"),
            output="embedding",
            dim=loaded.model.config.embed_dim,
            max_tokens=loaded.max_tokens,
            image_size=loaded.image.size,
            logit_scale=scale.item(),
            logit_bias=None if bias is None else bias.item(),
        )

    @property
    def probe(self) -> Ask:
        """A short text."""
        return TextAsk("a photo", name="probe")

    def warmup(self) -> None:
        """One text and one grey picture; raises CheckpointError where the vectors are not finite."""
        side = self.capabilities.image_size
        grey = torch.full((3, side, side), 128, dtype=torch.uint8)
        for item in (self.prepare(self.probe).value, grey):
            if any(isinstance(reply, RequestError) for reply in self.forward(self.collate([item]))):
                raise CheckpointError("the model's embeddings are not finite: its weights are damaged")

    def prepare(self, ask: Ask) -> Prepared[ClipItem]:
        """A picture to a uint8 square, a text to ids; raises RequestError(400) that names the ask."""
        if isinstance(ask, ImageAsk):
            pixels = pixels_of_one(ask.image, ask.name, self._loaded.image, max_pixels=self._max_pixels)
            return Prepared(pixels, "image", pixels.numel())
        encoding = self._tokenizer.encode(ask.text)
        truncated = bool(encoding.overflowing)
        if truncated and not ask.truncate:
            limit = self.capabilities.max_tokens
            message = f"{ask.name} has more than {limit} tokens; shorten it or send truncate=true"
            raise RequestError(400, "context_length_exceeded", message, ask.name)
        item = TextItem(tuple(encoding.ids), truncated)
        return Prepared(item, ("text", _length_class(len(item.ids))), 8 * len(item.ids))

    def collate(self, items: Sequence[ClipItem]) -> ClipBatch:
        """Pictures stacked, or ids padded on the tokenizer's side to the longest; on the model's device."""
        pixels = [item for item in items if isinstance(item, Tensor)]
        if pixels:
            return ClipBatch(torch.stack(pixels).to(self._device))
        texts = [item for item in items if isinstance(item, TextItem)]
        tokenizer = self._loaded.tokenizer
        longest = max(len(text.ids) for text in texts)
        if self._loaded.model.config.pad_to_max:
            longest = self._loaded.max_tokens
        ids, mask = [], []
        for text in texts:
            pad = longest - len(text.ids)
            before, behind = (pad, 0) if tokenizer.padding_side == "left" else (0, pad)
            ids.append([tokenizer.pad_token_id] * before + [*text.ids] + [tokenizer.pad_token_id] * behind)
            mask.append([0] * before + [1] * len(text.ids) + [0] * behind)
        return ClipBatch(
            token_ids_BT=torch.tensor(ids, device=self._device),
            mask_BT=torch.tensor(mask, device=self._device),
            truncated=tuple(text.truncated for text in texts),
        )

    @torch.inference_mode()
    def forward(self, batch: ClipBatch) -> list[Embedding | RequestError]:
        """The rows through their tower; an error for a row whose vector is not finite."""
        model = self._loaded.model
        if batch.pixels_BCHW is not None:
            vectors_ND = model.encode_image(batch.pixels_BCHW).float().cpu()
            tokens, truncated = [0] * len(vectors_ND), (False,) * len(vectors_ND)
        else:
            assert batch.token_ids_BT is not None
            assert batch.mask_BT is not None
            vectors_ND = model.encode_text(batch.token_ids_BT, batch.mask_BT).float().cpu()
            tokens, truncated = batch.mask_BT.sum(1).tolist(), batch.truncated
        finite = torch.isfinite(vectors_ND).all(1).tolist()
        return [
            Embedding(vector_D, length, cut) if sound else RequestError(500, "model_failed", NOT_FINITE)
            for sound, vector_D, length, cut in zip(finite, vectors_ND, tokens, truncated, strict=True)
        ]


def _length_class(tokens: int) -> int:
    """The power of two that is not below: texts of a class waste less than half a batch on padding."""
    return 1 << max(3, (tokens - 1).bit_length())
