"""The measuring of decode speed: it counts real tokens, and runs both families beside transformers."""

from __future__ import annotations

import pytest
import torch

from fmray.benchmarks.decoding import measure_decoding, real_tokens
from fmray.models.decoding.generate import Sampling
from tests.unit.models.decoding.policies import PAD, mixed_prompts, policy
from tests.unit.models.decoding.test_decoders import answers, often_ending


def test_padding_after_the_end_is_not_counted() -> None:
    assert real_tokens(torch.tensor([[5, 1, 0, 0], [1, 1, 1, 0], [5, 5, 5, 5]]), eos_id=1) == 2 + 1 + 4
    model = policy("llama")
    sampling = often_ending(model)
    out = answers(model, sampling)
    assert real_tokens(out.ids_BT, sampling.eos_id) == out.mask_BT.sum()


@pytest.mark.parametrize("name", ["t5 gated untied", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_sides_answer(name: str, precision: str) -> None:
    threads = torch.get_num_threads()
    speed = measure_decoding(
        policy(name).eval(), *mixed_prompts(), Sampling(4, -1, PAD), precision=precision, rounds=2, threads=1
    )  # type: ignore[arg-type]
    assert speed.batch == 4
    assert len(speed.ratios) == 2
    assert min(speed.ours, speed.theirs, *speed.ratios) > 0
    assert torch.get_num_threads() == threads
