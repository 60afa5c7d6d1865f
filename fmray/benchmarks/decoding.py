"""Decode tokens/s of a rollout policy beside transformers' `generate`: same module, prompts, sampling and threads."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmray.models.decoding.generate import Sampling, generate, make_decoder
from fmray.models.decoding.weights import DTYPES, Precision, base_model


@dataclass(frozen=True, slots=True)
class DecodingSpeed:
    """Medians over the rounds, which alternate both sides.

    `DecodingSpeed(batch=32, precision="fp32", ours=1200.0, theirs=500.0, ratio=2.4, ratios=(2.3, 2.4, 2.5))`
    """

    batch: int
    precision: Precision
    ours: float
    """Real tokens a second, EOS counted, padding not."""
    theirs: float
    ratio: float
    """Median of `ratios`."""
    ratios: tuple[float, ...]
    """Ours over theirs, round by round."""


def measure_decoding(
    model: Any,
    ids_BP: Tensor,
    mask_BP: Tensor,
    sampling: Sampling,
    *,
    precision: Precision = "fp32",
    rounds: int = 5,
    threads: int | None = None,
) -> DecodingSpeed:
    """Answer the same prompts with both sides, `rounds` times in turn after one round that is not counted.

    ids_BP, mask_BP: int64, left-padded for a decoder-only model (transformers asks for it). Both sides draw from the whole
    distribution at the sampling's temperature, each round with another seed. In bf16 transformers runs a bfloat16 copy
    of the module. threads: None leaves torch's.
    """
    decoder = make_decoder(model, precision)
    peer = base_model(model)
    if precision == "bf16":
        peer = copy.deepcopy(peer).to(DTYPES[precision])
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        measured = [
            (_ours(decoder, ids_BP, mask_BP, sampling, seed), _theirs(peer, ids_BP, mask_BP, sampling, seed))
            for seed in range(rounds + 1)
        ][1:]
    finally:
        torch.set_num_threads(before)
    ours, theirs = zip(*measured, strict=True)
    ratios = tuple(a / b for a, b in measured)
    return DecodingSpeed(
        len(ids_BP),
        precision,
        statistics.median(ours),
        statistics.median(theirs),
        statistics.median(ratios),
        ratios,
    )


def _ours(decoder: Any, ids_BP: Tensor, mask_BP: Tensor, sampling: Sampling, seed: int) -> float:
    rows_B = torch.arange(len(ids_BP))
    chosen = Sampling(
        sampling.max_new_tokens, sampling.eos_id, sampling.pad_id, sampling.temperature, seed=seed
    )
    started = time.perf_counter()
    answers = generate(decoder, ids_BP, mask_BP, rows_B, rows_B, chosen)
    return int(answers.mask_BT.sum()) / (time.perf_counter() - started)


def _theirs(peer: Any, ids_BP: Tensor, mask_BP: Tensor, sampling: Sampling, seed: int) -> float:
    torch.manual_seed(seed)
    started = time.perf_counter()
    out_BL = peer.generate(
        ids_BP.to(peer.device),
        attention_mask=mask_BP.to(peer.device),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sampling.eos_id,
        pad_token_id=sampling.pad_id,
    ).cpu()
    seconds = time.perf_counter() - started
    answer_BT = out_BL[:, 1:] if peer.config.is_encoder_decoder else out_BL[:, ids_BP.shape[1] :]
    return real_tokens(answer_BT, sampling.eos_id) / seconds


def real_tokens(answer_BT: Tensor, eos_id: int) -> int:
    """Tokens up to and including each row's first EOS."""
    ends_before_BT = (answer_BT == eos_id).cumsum(dim=1) - (answer_BT == eos_id).long()
    return int((ends_before_BT == 0).sum())
