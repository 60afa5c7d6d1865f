"""Answers that begin and end at different times, read by one decoder: prompts join, every row gets a token, rows leave.

K prompts that join  R rows  P prompt tokens  L columns  M rows · tokens  D width of the words  V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fmray.errors import ConfigError
from fmray.models.decoding.any import AnyCausalDecoder, ModuleRows
from fmray.models.decoding.attention import (
    aligned,
    aligned_words,
    attend_all,
    attend_one,
    cache_dtype,
    hiding,
)
from fmray.models.decoding.causal import Attention, CausalDecoder
from fmray.models.decoding.generate import Decoder
from fmray.models.decoding.slots import Slots


class Rows(Protocol):
    """What is being answered. A row's logits do not depend on the others, up to a product's rounding."""

    @property
    def count(self) -> int:
        """Rows."""
        ...

    @property
    def bytes(self) -> int:
        """Memory of their keys and values."""
        ...

    def step(self, ids_R: Tensor) -> Tensor:
        """Append one token to every row; logits of the next, float32 [R, V]. One that fails changes nothing."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in the order of `slots.closed_up`; the others' memory is free."""
        ...


class PromptRows(Rows, Protocol):
    """Rows that begin with a prompt of words."""

    def join(
        self, ids_KP: Tensor, mask_KP: Tensor, words_KPD: Tensor | None = None, memory: Any = None
    ) -> Tensor:
        """Prompts behind the present rows, padded on either side; logits of each one's first token, float32 [K, V].

        words_KPD: embeddings to read in place of the ids'. memory: what they look at (`gated_attention.Memory`), for gated
        layers alone.
        """
        ...


class CausalRows:
    """With a hand-written decoder, whose weights it reads; what the decoder itself answers meanwhile is its own matter."""

    def __init__(self, decoder: CausalDecoder) -> None:
        self._decoder = decoder
        self._dtype = cache_dtype(decoder.precision, decoder.device)
        self._slots = Slots(decoder.layers, decoder.heads, decoder.width, self._dtype, decoder.device)

    @property
    def count(self) -> int:
        return len(self._slots.lengths)

    @property
    def bytes(self) -> int:
        return self._slots.bytes

    def join(
        self, ids_KP: Tensor, mask_KP: Tensor, words_KPD: Tensor | None = None, memory: Any = None
    ) -> Tensor:
        decoder, device = self._decoder, self._decoder.device
        if words_KPD is not None:
            words_KPD = aligned_words(words_KPD, mask_KP, "right")
        ids_KP, mask_KP = aligned(ids_KP, mask_KP, "right")
        prompts, columns = ids_KP.shape
        lengths_K = mask_KP.sum(dim=1)
        x_KPD = decoder.embed(ids_KP, torch.arange(columns, device=device).expand(prompts, -1), words_KPD)
        real_M = mask_KP.flatten().nonzero().squeeze(1)  # padding passes no matrix
        causal_PP = torch.ones(columns, columns, dtype=torch.bool, device=device).tril()
        bias = hiding(causal_PP, self._dtype).view(1, 1, columns, columns)
        self._slots.add(lengths_K.tolist())

        def attention(layer: int, qkv_MX: Tensor) -> Tensor:
            padded = qkv_MX.new_zeros((prompts * columns, qkv_MX.shape[1]), dtype=self._dtype)
            padded[real_M] = qkv_MX.to(self._dtype)
            parts = decoder.split(padded.view(prompts, columns, -1, decoder.width))
            q, k, v = (part.transpose(1, 2) for part in parts)
            self._slots.write(layer, k, v)
            return attend_all(q, k, v, bias).flatten(0, 1)[real_M]

        first = self.count - prompts
        x_MD = self._trunk(x_KPD.flatten(0, 1)[real_M], attention, first)
        return decoder.logits(x_MD[lengths_K.cumsum(0) - 1])

    def step(self, ids_R: Tensor) -> Tensor:
        decoder, slots, rows = self._decoder, self._slots, len(ids_R)
        slots.make_room()
        at_R = torch.tensor(slots.lengths, device=decoder.device)
        with_it = [length + 1 for length in slots.lengths]
        columns, bias = max(with_it), slots.bias(with_it)
        x_RD = decoder.embed(ids_R[:, None], at_R[:, None]).squeeze(1)

        def attention(layer: int, qkv_RX: Tensor) -> Tensor:
            q, k, v = decoder.split(qkv_RX.to(self._dtype).view(rows, 1, -1, decoder.width))
            slots.append(layer, at_R, k.squeeze(1), v.squeeze(1))
            q_RHGW = q.view(rows, decoder.heads, decoder.groups, decoder.width)
            return attend_one(q_RHGW, *slots.held(layer, 0, columns), bias)

        logits_RV = decoder.logits(self._trunk(x_RD, attention, 0))
        slots.grown()
        return logits_RV

    def keep(self, rows: Sequence[int]) -> None:
        self._slots.keep(rows)

    def _trunk(self, x_MD: Tensor, attention: Attention, first: int) -> Tensor:
        """All layers, for the rows from `first` on."""
        return self._decoder.trunk(x_MD, attention)


def prompt_rows(decoder: Decoder) -> PromptRows:
    """Rows for a decoder-only model. Raises ConfigError for an encoder-decoder, which reads no dialogue."""
    if isinstance(decoder, CausalDecoder):
        return CausalRows(decoder)
    if isinstance(decoder, AnyCausalDecoder):
        return ModuleRows(decoder)
    raise ConfigError(
        "decoder", type(decoder).__name__, "answers join one another in decoder-only models alone"
    )
