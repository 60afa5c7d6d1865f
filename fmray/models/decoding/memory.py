"""GPT-2 that looks at a memory, as a VQA model's decoder does, for answers that begin and end at different times.

K rows that join  R rows  T tokens of a memory  M rows · tokens  D width  H heads  W width of a head
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmray.models.decoding.attention import attend_one
from fmray.models.decoding.causal import Attention
from fmray.models.decoding.gpt2 import Gpt2Decoder, Norm
from fmray.models.decoding.rows import CausalRows
from fmray.models.decoding.slots import Slots
from fmray.models.decoding.weights import Matrix, Precision


class _Source:
    """A layer's cross-attention."""

    def __init__(self, block: Any, precision: Precision) -> None:
        attention = block.crossattention
        self.norm = Norm(block.ln_cross_attn)
        self.q = Matrix([attention.q_attn], precision, scaled=(attention.embed_dim, attention.scaling))
        self.kv, self.out = Matrix([attention.c_attn], precision), Matrix([attention.c_proj], precision)


class MemoryGpt2Decoder(Gpt2Decoder):
    """`transformers.GPT2LMHeadModel` with cross-attention in every block."""

    look: Attention
    """(layer, queries [M, H · W]) to what they saw of the memory; set before `trunk`."""

    def refresh(self) -> None:
        super().refresh()
        self._sources = []
        self._sources = [_Source(block, self.precision) for block in self._model.transformer.h]

    def keys_values(self, layer: int, tokens_NTD: Tensor) -> Tensor:
        """A layer's keys and values of a memory, [N, T, 2 · H · W]."""
        flat: Tensor = self._sources[layer].kv(tokens_NTD.flatten(0, 1))
        return flat.view(*tokens_NTD.shape[:2], -1)

    def trunk(self, x_MD: Tensor, attention: Attention) -> Tensor:
        for index, (layer, source) in enumerate(zip(self._blocks, self._sources, strict=True)):
            x_MD += layer.out(attention(index, layer.qkv(layer.norm_1(x_MD))))
            x_MD += source.out(self.look(index, source.q(source.norm(x_MD))))
            x_MD += layer.down(layer.act(layer.up(layer.norm_2(x_MD))))
        return x_MD


class MemoryRows(CausalRows):
    """Every row begins with the same token, and has a memory of its own."""

    def __init__(self, decoder: MemoryGpt2Decoder, start_id: int) -> None:
        super().__init__(decoder)
        self._gpt2, self._start_id = decoder, start_id
        self._memory = Slots(decoder.layers, decoder.heads, decoder.width, self._dtype, decoder.device)

    @property
    def bytes(self) -> int:
        return super().bytes + self._memory.bytes

    def begin(self, parts: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int]) -> Tensor:
        """Rows behind the present ones; logits of their first tokens, float32 [K, V].

        parts: float [N, T, D] with the rows' places in it, int64 [K]: pieces of the memories, side by side, each projected once
        however many rows have it. lengths: how many of a row's tokens, from the first, are real.
        """
        decoder, rows = self._gpt2, len(lengths)
        self._memory.add(lengths)
        longest = max(lengths)
        for layer in range(decoder.layers):
            pieces = [decoder.keys_values(layer, tokens).index_select(0, of_K) for tokens, of_K in parts]
            kv_KTX = torch.cat(pieces, dim=1)[:, :longest].to(self._dtype)
            heads = kv_KTX.view(rows, longest, 2, decoder.heads, decoder.width).permute(2, 0, 3, 1, 4)
            self._memory.write(layer, heads[0], heads[1])
        first = torch.full((rows, 1), self._start_id, device=decoder.device)
        return self.join(first, torch.ones_like(first))

    def keep(self, rows: Sequence[int]) -> None:
        self._memory.keep(rows)
        super().keep(rows)

    def _trunk(self, x_MD: Tensor, attention: Attention, first: int) -> Tensor:
        decoder, memory = self._gpt2, self._memory
        lengths = memory.lengths[first:]
        longest, bias = max(lengths), memory.bias(lengths)

        def look(layer: int, q_RX: Tensor) -> Tensor:
            q_RHW = q_RX.to(self._dtype).view(len(q_RX), decoder.heads, 1, decoder.width)
            return attend_one(q_RHW, *memory.held(layer, first, longest), bias)

        decoder.look = look
        return super()._trunk(x_MD, attention, first)
