"""Prompts without their padding, attention of many tokens at once and of one new token over what is kept.

B rows  H key/value heads  G query heads that share one  S source  L columns kept  W width of a head
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.errors import DataError
from fmray.models.decoding.weights import DTYPES, Precision


def aligned(ids_NP: Tensor, mask_NP: Tensor, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """The tokens under the mask in their order, padded on `side` to the longest, ids 0 at padding; and the new mask.

    What the mask leaves out does not exist: its place, number and ids change nothing. Raises DataError for a prompt
    without tokens, or shapes that differ.
    """
    if ids_NP.dim() != 2 or ids_NP.shape != mask_NP.shape:
        raise DataError(
            f"prompts: ids {tuple(ids_NP.shape)} and mask {tuple(mask_NP.shape)} must be the same [N, P]"
        )
    real_NP = mask_NP.bool()
    lengths_N = real_NP.sum(dim=1)
    if not bool((lengths_N > 0).all()):
        raise DataError(
            f"prompt {int((lengths_N == 0).nonzero()[0])} has no token; give it at least one (an EOS or BOS)"
        )
    longest = int(lengths_N.max())
    order_NP = (real_NP if side == "left" else ~real_NP).int().argsort(dim=1, stable=True)
    order_NP = order_NP[:, -longest:] if side == "left" else order_NP[:, :longest]
    mask_NP = real_NP.gather(1, order_NP)
    return torch.where(mask_NP, ids_NP.gather(1, order_NP), 0), mask_NP


def aligned_words(words_NPD: Tensor, mask_NP: Tensor, side: Literal["left", "right"] = "left") -> Tensor:
    """Prompts that are given as embeddings, in the places that `aligned` gives their tokens."""
    places_NP = torch.arange(mask_NP.shape[1], device=mask_NP.device).expand_as(mask_NP)
    order_NP, _ = aligned(places_NP, mask_NP, side)
    return words_NPD.gather(1, order_NP.unsqueeze(-1).expand(-1, -1, words_NPD.shape[-1]))


def hiding(mask_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores to add so that only columns under the mask are seen, [B, 1, 1, L].

    The lowest finite number, so that a row which may see nothing stays a number.
    """
    scores_BL = torch.zeros(mask_BL.shape, dtype=dtype, device=mask_BL.device)
    return scores_BL.masked_fill_(~mask_BL, torch.finfo(dtype).min)[:, None, None, :]


def attend_all(q_BHTW: Tensor, k_BHSW: Tensor, v_BHSW: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of T queries with unscaled scores; bias broadcasts to [B, query heads, T, S]. [B, T, heads · W]."""
    groups = q_BHTW.shape[1] // k_BHSW.shape[1]
    if groups > 1:
        k_BHSW, v_BHSW = (x.repeat_interleave(groups, dim=1) for x in (k_BHSW, v_BHSW))
    seen_BHTW = F.scaled_dot_product_attention(q_BHTW, k_BHSW, v_BHSW, attn_mask=bias, scale=1.0)
    return seen_BHTW.transpose(1, 2).flatten(2)


def attend_one(q_BHGW: Tensor, k_BHLW: Tensor, v_BHLW: Tensor, bias_NXL: Tensor | None) -> Tensor:
    """Attention of one token per row with unscaled scores, softmax in float32. bias_NXL broadcasts to [B·H, G, L].

    Two grouped products: at one token a third faster than the fused kernel on a CPU. [B, H · G · W].
    """
    B, H, G, W = q_BHGW.shape
    q_NGW = q_BHGW.reshape(B * H, G, W)
    k_NWL = k_BHLW.flatten(0, 1).transpose(1, 2)
    scores_NGL = torch.bmm(q_NGW, k_NWL) if bias_NXL is None else torch.baddbmm(bias_NXL, q_NGW, k_NWL)
    p_NGL = torch.softmax(scores_NGL, dim=-1, dtype=torch.float32).to(v_BHLW.dtype)
    return torch.bmm(p_NGL, v_BHLW.flatten(0, 1)).view(B, H * G * W)


class KeyValues:
    """Keys and values of every layer, written in place: `keys[layer]` and `values[layer]` are [B, H, L, W]."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys, self.values = keys, values

    @staticmethod
    def empty(
        layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> KeyValues:
        """Room for that many layers of shape [B, H, L, W]."""
        rooms = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2 * layers)]
        return KeyValues(rooms[:layers], rooms[layers:])

    def keep(self, rows_K: Tensor, filled: int) -> None:
        """Keep these rows and drop the others; only the first `filled` columns hold anything yet."""
        for held in (self.keys, self.values):
            for layer, old_BHLW in enumerate(held):
                new_KHLW = old_BHLW.new_empty((len(rows_K), *old_BHLW.shape[1:]))
                new_KHLW[:, :, :filled] = old_BHLW[:, :, :filled].index_select(0, rows_K)
                held[layer] = new_KHLW


def cache_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """float32 on a CPU, whose small bf16 products are slower than float32 ones; elsewhere the matrices' own."""
    return torch.float32 if device.type == "cpu" else DTYPES[precision]
