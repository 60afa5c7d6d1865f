"""A dual encoder behind an endpoint: texts and images to vectors of one space.

N asks of one batch  B rows of one kind  T tokens  C,H,W pixels  D width of the shared space
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fmray.errors import CheckpointError, RequestError
from fmray.models.saved import LoadedDualEncoder
from fmray.serving.asks import Ask, ImageAsk, TextAsk
from fmray.serving.engines import Capabilities, ServingEngine
from fmray.serving.images import pixels_of


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
class ClipInputs:
    """A mixed batch: each side's rows, and which ask each belongs to."""

    pixels_BCHW: Tensor | None
    """uint8."""
    image_asks: tuple[int, ...]
    token_ids_BT: Tensor | None
    mask_BT: Tensor | None
    text_asks: tuple[int, ...]
    tokens: tuple[int, ...]
    """Per ask."""
    truncated: tuple[bool, ...]
    """Per ask."""


@dataclass(frozen=True, slots=True)
class ClipOutputs:
    """Unit vectors in the order of the asks."""

    vectors_ND: Tensor
    inputs: ClipInputs


class EmbeddingEngine(ServingEngine[Ask, Any, Any, Embedding], Protocol):
    """What `/v1/embeddings` and `/v1/classify` need."""

    @property
    def capabilities(self) -> EmbeddingCapabilities: ...


class ClipEngine:
    """A dual encoder: texts and images in one batch, each through its own tower."""

    max_batch = 64

    def __init__(self, loaded: LoadedDualEncoder, *, max_pixels: int) -> None:
        self._loaded = loaded
        self._max_pixels = max_pixels
        self._device = next(loaded.model.parameters()).device
        self._tokenizer_lock = (
            threading.Lock()
        )  # a fast tokenizer's padding is state: two threads panic on it
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

    def warmup(self) -> None:
        """One text and one grey picture; raises CheckpointError where the vectors are not finite."""
        side = self.capabilities.image_size
        text = self.prepare([TextAsk("a photo", name="warm-up")])
        grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
        image = ClipInputs(grey, (0,), None, None, (), (0,), (False,))
        for inputs in (text, image):
            if not torch.isfinite(self.forward(inputs).vectors_ND).all():
                raise CheckpointError("the model's embeddings are not finite: its weights are damaged")

    def prepare(self, asks: Sequence[Ask]) -> ClipInputs:
        """Pictures to uint8 squares, texts to padded ids; raises RequestError(400) that names the ask."""
        image_asks = tuple(i for i, ask in enumerate(asks) if isinstance(ask, ImageAsk))
        images = [ask for ask in asks if isinstance(ask, ImageAsk)]
        pixels = pixels_of(
            [(ask.image, ask.name) for ask in images], self._loaded.image, max_pixels=self._max_pixels
        )
        texts = {i: ask for i, ask in enumerate(asks) if isinstance(ask, TextAsk)}
        token_ids, mask, overflowed = self._tokenize([ask.text for ask in texts.values()])
        tokens, truncated = [0] * len(asks), [False] * len(asks)
        for row, (i, ask) in enumerate(texts.items()):
            assert mask is not None
            tokens[i], truncated[i] = int(mask[row].sum()), overflowed[row]
            if truncated[i] and not ask.truncate:
                limit = self.capabilities.max_tokens
                message = f"{ask.name} has more than {limit} tokens; shorten it or send truncate=true"
                raise RequestError(400, "context_length_exceeded", message, ask.name)
        return ClipInputs(pixels, image_asks, token_ids, mask, tuple(texts), tuple(tokens), tuple(truncated))

    def _tokenize(self, texts: list[str]) -> tuple[Tensor | None, Tensor | None, list[bool]]:
        """Ids and mask, int64 [B, T], and which texts were cut."""
        if not texts:
            return None, None, []
        padding = "max_length" if self._loaded.model.config.pad_to_max else "longest"
        with self._tokenizer_lock:
            batch = self._loaded.tokenizer(
                texts,
                padding=padding,
                truncation=True,
                max_length=self._loaded.max_tokens,
                return_attention_mask=True,
                return_tensors="pt",
            )
        overflowed = [bool(encoding.overflowing) for encoding in batch.encodings]
        return batch["input_ids"], batch["attention_mask"], overflowed

    @torch.inference_mode()
    def forward(self, inputs: ClipInputs) -> ClipOutputs:
        """Both towers over their rows; float32 [N, D] on the device."""
        model, device = self._loaded.model, self._device
        vectors_ND = torch.empty(len(inputs.tokens), self.capabilities.dim, device=device)
        if inputs.pixels_BCHW is not None:
            vectors_ND[list(inputs.image_asks)] = model.encode_image(inputs.pixels_BCHW.to(device))
        if inputs.token_ids_BT is not None and inputs.mask_BT is not None:
            vectors_ND[list(inputs.text_asks)] = model.encode_text(
                inputs.token_ids_BT.to(device), inputs.mask_BT.to(device)
            )
        return ClipOutputs(vectors_ND, inputs)

    def finish(self, outputs: ClipOutputs) -> list[Embedding]:
        """The rows, one embedding per ask."""
        vectors_ND = outputs.vectors_ND.cpu()
        facts = zip(vectors_ND, outputs.inputs.tokens, outputs.inputs.truncated, strict=True)
        return [Embedding(vector_D, tokens, truncated) for vector_D, tokens, truncated in facts]
