"""What decoder-only policies share: prompts read once, their keys and values spread over the samples, one token a step.

N prompts  B rows  M rows · tokens  P prompt tokens  L columns kept  H key/value heads  G query heads on each  W width of a head
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmray.errors import DataError
from fmray.models.decoding.attention import (
    KeyValues,
    aligned,
    aligned_words,
    attend_all,
    attend_one,
    cache_dtype,
    hiding,
)
from fmray.models.decoding.weights import Matrix, Precision

Attention = Callable[[int, Tensor], Tensor]
"""(layer, its fused queries, keys and values [M, (G + 2) · H · W]) to what the heads saw [M, G · H · W]."""


class CausalDecoder(ABC):
    """The road of every decoder-only architecture; a subclass knows its layers.

    Prompts lie left-padded in the cache, so that all rows write the same column; positions count real tokens alone.
    """

    heads: int
    """Key/value heads."""
    groups: int
    """Query heads on each."""
    width: int
    """Width of a head."""
    layers: int
    head: Matrix

    def __init__(self, model: Any, precision: Precision, replaced: tuple[int, Any] | None = None) -> None:
        """replaced: a token and the layer that says its logit in the place of the output matrix's row."""
        self._model, self.precision, self.replaced = model, precision, replaced
        self._kv, self._filled = KeyValues([], []), 0
        self._hidden_BL: Tensor | None = None
        self.refresh()

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @abstractmethod
    def refresh(self) -> None:
        """Copy the module's weights, fused and packed."""

    @abstractmethod
    def embed(self, ids_BP: Tensor, positions_BP: Tensor, words_BPD: Tensor | None = None) -> Tensor:
        """Input of the first layer, float32 [B, P, D], with words_BPD in place of the tokens' embeddings where they are given.

        A tensor of its own, which `trunk` may overwrite. Also prepares `rotate` for these positions.
        """

    def rotate(self, qk_BPXW: Tensor) -> Tensor:
        """Queries and keys as the attention compares them (RoPE), in place or not."""
        return qk_BPXW

    @abstractmethod
    def trunk(self, x_MD: Tensor, attention: Attention) -> Tensor:
        """All layers, the final norm not counted; x may be overwritten (sums in place: half the memory traffic)."""

    @abstractmethod
    def logits(self, x_BD: Tensor) -> Tensor:
        """Final norm and head, float32 [B, V]."""

    @abstractmethod
    def positions(self) -> int | None:
        """How many positions the architecture has; None where there is no end."""

    def start(
        self,
        ids_NP: Tensor,
        mask_NP: Tensor,
        prompt_of_B: Tensor,
        max_new_tokens: int,
        words_NPD: Tensor | None = None,
    ) -> Tensor:
        if words_NPD is not None:
            words_NPD = aligned_words(words_NPD, mask_NP)
        ids_NP, mask_NP = aligned(ids_NP, mask_NP, "left")
        (prompts, columns), samples = ids_NP.shape, len(prompt_of_B)
        if (limit := self.positions()) is not None and columns + max_new_tokens > limit:
            raise DataError(
                f"prompt and answer may take {columns} + {max_new_tokens} tokens, but the policy has {limit} positions; "
                "shorten the prompts or max_new_tokens"
            )
        lengths_N = mask_NP.sum(dim=1)
        positions_NP = torch.arange(columns, device=self.device) - (columns - lengths_N)[:, None]
        x_NPD = self.embed(ids_NP, positions_NP.clamp_min(0), words_NPD)
        padded = bool((lengths_N < columns).any())
        causal_PP = torch.ones(columns, columns, dtype=torch.bool, device=self.device).tril()
        dtype = cache_dtype(self.precision, self.device)
        bias = hiding(causal_PP, dtype).view(1, 1, columns, columns)
        if padded:
            bias = torch.minimum(bias, hiding(mask_NP, dtype))
        self._kv = KeyValues.empty(
            self.layers, (samples, self.heads, columns + max_new_tokens, self.width), dtype, self.device
        )

        def attention(layer: int, qkv_MX: Tensor) -> Tensor:
            q, k, v = self.split(qkv_MX.to(dtype).view(prompts, columns, -1, self.width))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            self._kv.keys[layer][:, :, :columns] = k.index_select(0, prompt_of_B)
            self._kv.values[layer][:, :, :columns] = v.index_select(0, prompt_of_B)
            return attend_all(q, k, v, bias).flatten(0, 1)

        x_NPD = self.trunk(x_NPD.flatten(0, 1), attention).view(prompts, columns, -1)
        self._filled = columns
        self._positions_B = lengths_N[prompt_of_B]
        self._hidden_BL = None
        if padded:
            room_N = mask_NP.new_ones((prompts, max_new_tokens))
            self._hidden_BL = hiding(torch.cat([mask_NP, room_N], dim=1), dtype)[prompt_of_B, 0, 0]
        return self.logits(x_NPD[:, -1])[prompt_of_B]

    def step(self, ids_R: Tensor) -> Tensor:
        rows, column = len(ids_R), self._filled
        x_RD = self.embed(ids_R[:, None], self._positions_B[:, None]).squeeze(1)
        bias = None
        if self._hidden_BL is not None:
            bias = self._hidden_BL[:, None, : column + 1].repeat_interleave(self.heads, dim=0)

        def attention(layer: int, qkv_RX: Tensor) -> Tensor:
            keys, values = self._kv.keys[layer], self._kv.values[layer]
            q, k, v = self.split(qkv_RX.to(keys.dtype).view(rows, 1, -1, self.width))
            keys[:, :, column] = k.squeeze(1)
            values[:, :, column] = v.squeeze(1)
            q_RHGW = q.view(rows, self.heads, self.groups, self.width)
            return attend_one(q_RHGW, keys[:, :, : column + 1], values[:, :, : column + 1], bias)

        x_RD = self.trunk(x_RD, attention)
        self._filled += 1
        self._positions_B = self._positions_B + 1
        return self.logits(x_RD)

    def keep(self, rows_K: Tensor) -> None:
        self._kv.keep(rows_K, self._filled)
        self._positions_B = self._positions_B[rows_K]
        if self._hidden_BL is not None:
            self._hidden_BL = self._hidden_BL[rows_K]

    def split(self, qkv_BPXW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fused heads as queries and keys, rotated, and values: [B, P, H · G, W], [B, P, H, W] twice."""
        queries = self.heads * self.groups
        qk = self.rotate(qkv_BPXW[:, :, : -self.heads])
        return qk[:, :, :queries], qk[:, :, queries:], qkv_BPXW[:, :, -self.heads :]
