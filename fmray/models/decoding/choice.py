"""The next token of rows that differ in their wishes: greedy or drawn, from a nucleus or from all, with alternatives beside it.

R rows  V vocabulary  K alternatives
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmray.errors import ConfigError
from fmray.models.decoding.sampling import WORD, sample_tokens, uniforms

MOST_ALTERNATIVES = 20
"""What OpenAI's `top_logprobs` goes up to."""
NUCLEUS = 256
"""Tokens that are sorted at first to find a nucleus's edge; a flat distribution is sorted whole."""


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """One conversation's wishes. `AnswerOptions(max_new_tokens=64, temperature=0.7, top_p=0.9, seed=3)`

    Raises ConfigError where a value is out of its range.
    """

    max_new_tokens: int
    """Longest answer, its end among them; at least 1."""
    temperature: float = 0.0
    """Logits are divided by it before one is drawn; 0: the likeliest token."""
    top_p: float = 1.0
    """In (0, 1]: drawn are the fewest likeliest tokens that have this share of the probability (Holtzman et al. 2020, §3.1)."""
    seed: int = 0
    """Any integer: noise is a function of seed and position, so that a request's answer is the same whatever runs beside it."""
    top_logprobs: int = 0
    """Likeliest tokens to tell beside each chosen one, 0 to 20."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", self.max_new_tokens, "must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError("temperature", self.temperature, "must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "must be above 0 and at most 1")
        if not 0 <= self.top_logprobs <= MOST_ALTERNATIVES:
            raise ConfigError("top_logprobs", self.top_logprobs, f"must be 0 to {MOST_ALTERNATIVES}")


@dataclass(frozen=True, slots=True)
class Choice:
    """A row's next token. `Choice(9, -0.105, ((9, -0.105), (4, -2.303)), finite=True)`"""

    token: int
    logprob: float
    """Of the model's own distribution: neither temperature nor nucleus is in it."""
    alternatives: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, the likeliest first."""
    finite: bool
    """False: the row's logits hold no distribution, and the token means nothing."""


def choose(logits_RV: Tensor, options: Sequence[AnswerOptions], positions: Sequence[int]) -> list[Choice]:
    """The token at each row's position (0 is its answer's first). logits_RV: float32, −inf allowed.

    A row's choice depends on its logits, wishes and position alone.
    """
    whole_R = torch.logsumexp(logits_RV, dim=-1)
    finite_R = torch.isfinite(whole_R)
    finite = finite_R.tolist()
    if not all(finite):
        logits_RV = logits_RV.masked_fill(~finite_R[:, None], 0.0)
    ids_R = logits_RV.argmax(dim=-1)
    drawn = [row for row, wishes in enumerate(options) if wishes.temperature > 0]
    if drawn:
        rows_D = torch.tensor(drawn, device=logits_RV.device)
        some = [options[row] for row in drawn]
        ids_R[rows_D] = _drawn(logits_RV[rows_D], some, [positions[row] for row in drawn])
    logp_R = (logits_RV.gather(1, ids_R[:, None]).squeeze(1) - whole_R).tolist()
    beside = _likeliest(logits_RV, whole_R, [wishes.top_logprobs for wishes in options])
    return [Choice(*each) for each in zip(ids_R.tolist(), logp_R, beside, finite, strict=True)]


def _drawn(logits_DV: Tensor, options: Sequence[AnswerOptions], positions: Sequence[int]) -> Tensor:
    device = logits_DV.device
    temperature_D = torch.tensor([wishes.temperature for wishes in options], device=device)
    # from the greatest down: a tiny temperature makes no infinity
    logits_DV = (logits_DV - logits_DV.amax(dim=-1, keepdim=True)) / temperature_D[:, None]
    if any(wishes.top_p < 1 for wishes in options):
        share_D = torch.tensor([wishes.top_p for wishes in options], dtype=torch.float64, device=device)
        logits_DV = nucleus(logits_DV, share_D)
    seeds = [(wishes.seed + WORD // 2) % WORD - WORD // 2 for wishes in options]
    seed_D, at_D = torch.tensor(seeds, device=device), torch.tensor(list(positions), device=device)
    ids_D, _ = sample_tokens(logits_DV, uniforms(0, seed_D, at_D))
    return ids_D


def nucleus(logits_RV: Tensor, share_R: Tensor) -> Tensor:
    """−inf at all but the fewest likeliest tokens that have at least this share of the probability; equals of the last stay too.

    share_R: float64 in (0, 1], 1: all stay.
    """
    p_RV = torch.softmax(logits_RV, dim=-1)
    for width in (min(NUCLEUS, p_RV.shape[1]), p_RV.shape[1]):
        top_RK = p_RV.topk(width, dim=-1).values
        before_RK = top_RK.double().cumsum(dim=-1) - top_RK
        inside_RK = before_RK < share_R[:, None]
        if not bool((inside_RK[:, -1] & (share_R < 1)).any()):
            break
    edge_R = top_RK.gather(1, inside_RK.sum(dim=-1, keepdim=True) - 1).squeeze(1)
    edge_R = edge_R.masked_fill(share_R >= 1, 0.0)
    return logits_RV.masked_fill(p_RV < edge_R[:, None], -torch.inf)


def _likeliest(
    logits_RV: Tensor, whole_R: Tensor, counts: Sequence[int]
) -> list[tuple[tuple[int, float], ...]]:
    found: list[tuple[tuple[int, float], ...]] = [()] * len(counts)
    asking = [row for row, count in enumerate(counts) if count]
    if asking:
        rows_A = torch.tensor(asking, device=logits_RV.device)
        most = min(max(counts), logits_RV.shape[1])
        top = logits_RV[rows_A].topk(most, dim=-1)
        logp_AK = (top.values - whole_R[rows_A, None]).tolist()
        for row, ids, logps in zip(asking, top.indices.tolist(), logp_AK, strict=True):
            found[row] = tuple(zip(ids, logps, strict=True))[: counts[row]]
    return found
