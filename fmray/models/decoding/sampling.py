"""From logits to tokens without a random state: noise is a function of (seed, sample, position) and nothing else.

B rows  V vocabulary  C chunks of the vocabulary

Which replica answers, in what order and after how many retries then changes no token, and there is no generator to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 1 << 64
SAMPLE_STEP, POSITION_STEP = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
"""Odd, so that no two samples and no two positions of one sample meet: the golden ratio, and a multiplier of good spectrum."""
CHUNK = 128
"""Tokens of a chunk: the search for a token looks at V / CHUNK sums, then at CHUNK probabilities."""


def uniforms(seed: int, sample_ids_B: Tensor, position: int | Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, sample id, position), float64, 53 random bits.

    seed: any integer, taken modulo 2**64. sample_ids_B: int64, any shape. position: an integer or int64 that broadcasts
    against the ids (`uniforms(0, ids_B[:, None], torch.arange(T))` is [B, T]). Each of the three words goes through
    the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), a bijection
    of 64-bit words; equal inputs give equal numbers on every device.
    """
    key = sample_ids_B.new_tensor(_signed((seed + SAMPLE_STEP) % WORD))  # 0 would stay 0
    of_sample = _mix(_mix(key) + sample_ids_B * _signed(SAMPLE_STEP))
    if isinstance(position, int):
        mixed = _mix(of_sample + _signed(position * POSITION_STEP % WORD))
    else:
        mixed = _mix(of_sample + position * _signed(POSITION_STEP))
    return _shift(mixed, 11).double() * 2.0**-53


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The token at which the cumulated probability passes u, int64 [B], and its log-probability, float32 [B].

    logits_BV: float32, −inf allowed. uniforms_B: float64 in [0, 1). Both results are of softmax(logits / temperature), the
    whole vocabulary: what samples is what scores. A token of probability zero is never returned, whatever u. A row with
    NaN gives a NaN log-probability.
    """
    p_BV = _softmax(logits_BV, temperature)
    rows, vocabulary = p_BV.shape
    chunks = -(-vocabulary // CHUNK)
    if vocabulary < chunks * CHUNK:
        p_BV = torch.nn.functional.pad(p_BV, (0, chunks * CHUNK - vocabulary))
    p_BCK = p_BV.view(rows, chunks, CHUNK)
    chunk_B, rest_B = _search(p_BCK.sum(-1), uniforms_B, share=True)
    inside_BK = p_BCK[torch.arange(rows, device=p_BV.device), chunk_B]
    place_B, _ = _search(inside_BK, rest_B, share=False)
    p_B = inside_BK.gather(1, place_B.unsqueeze(1)).squeeze(1)
    return chunk_B * CHUNK + place_B, p_B.log()


def most_likely_tokens(logits_BV: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The likeliest token, the first of equals, int64 [B], and its log-probability at that temperature, float32 [B]."""
    ids_B = logits_BV.argmax(dim=-1)
    p_BV = _softmax(logits_BV, temperature)
    return ids_B, p_BV.gather(1, ids_B.unsqueeze(1)).squeeze(1).log()


def _softmax(logits_BV: Tensor, temperature: float) -> Tensor:
    logits_BV = logits_BV.float() if temperature == 1.0 else logits_BV.float() / temperature
    return torch.softmax(logits_BV, dim=-1)


def _search(weight_BN: Tensor, target_B: Tensor, *, share: bool) -> tuple[Tensor, Tensor]:
    """First place whose cumulated weight passes the target, and what the target lacks from the weights before it.

    share: the target is a share of the whole, else an amount. Held just under the sum, so that rounding or u → 1 end at
    the last weight above zero: a place is returned only if the sum grows there.
    """
    total_BN = weight_BN.double().cumsum(-1)
    whole_B = total_BN[:, -1]
    target_B = target_B * whole_B if share else target_B
    below_B = torch.nextafter(whole_B, torch.zeros_like(whole_B))
    target_B = torch.minimum(target_B, below_B)
    place_B = (total_BN <= target_B.unsqueeze(1)).sum(-1)
    index_B1 = place_B.unsqueeze(1)
    before_B = total_BN.gather(1, index_B1).squeeze(1) - weight_BN.gather(1, index_B1).squeeze(1)
    return place_B, (target_B - before_B).clamp_min(0)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift to the right that fills with zeros; torch's own repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return word - WORD if word >= WORD // 2 else word
