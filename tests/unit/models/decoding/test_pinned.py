"""The two pinned policies, at their real size: the same words as transformers, and log-probabilities that a forward confirms."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from fmray.assets import fetch
from fmray.models.decoding.generate import Sampling, generate, make_decoder
from tests.unit.models.decoding.policies import forward_logits

TEXTS = ["translate English to German: The house is wonderful.", "A film that", "Is the sky green?"]


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize(
    ("asset", "auto"), [("flan_t5_small", AutoModelForSeq2SeqLM), ("smollm2_135m", AutoModelForCausalLM)]
)
def test_pinned_policies_answer_as_in_transformers(asset: str, auto: type) -> None:
    folder = fetch(asset)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prompts = tokenizer(TEXTS, return_tensors="pt", padding=True)
    sampling = Sampling(12, tokenizer.eos_token_id, pad, greedy=True)
    decoder = make_decoder(model)
    every = torch.arange(len(TEXTS))
    ours = generate(decoder, prompts.input_ids, prompts.attention_mask, every, every, sampling)
    theirs = model.generate(
        **prompts,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=sampling.eos_id,
        pad_token_id=pad,
        repetition_penalty=1.0,
    )
    theirs = theirs[:, 1:] if model.config.is_encoder_decoder else theirs[:, prompts.input_ids.shape[1] :]
    assert torch.equal(ours.ids_BT, theirs[:, : ours.ids_BT.shape[1]])

    prompt_of_B = torch.tensor([0, 1, 1, 2])
    drawn = Sampling(12, tokenizer.eos_token_id, pad, seed=3)
    out = generate(decoder, prompts.input_ids, prompts.attention_mask, torch.arange(4), prompt_of_B, drawn)
    logits = forward_logits(
        model, prompts.input_ids[prompt_of_B], prompts.attention_mask[prompt_of_B], out.ids_BT
    )
    scored = logits.log_softmax(-1).gather(2, out.ids_BT[..., None]).squeeze(2) * out.mask_BT
    torch.testing.assert_close(out.logp_BT, scored, atol=2e-4, rtol=1e-4)
