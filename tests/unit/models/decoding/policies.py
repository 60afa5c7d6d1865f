"""Tiny random policies of every architecture, with biases and gains off their neutral start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, EOS, PAD = 97, 1, 0
IDS = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None, "decoder_start_token_id": PAD}

_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3, **IDS}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **IDS,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def _untied(model: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    return model


MAKERS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "t5 gated untied": lambda: _untied(
        T5ForConditionalGeneration(T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=40,
            scale_attn_by_inverse_layer_idx=True,
            **IDS,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "llama scaled rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **_LLAMA, rope_parameters=_LLAMA3, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA)),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            **{**IDS, "forced_eos_token_id": None},
        )
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            **IDS,
        )
    ),
}
OWN_STEPS = ("t5", "t5 gated untied", "gpt2", "llama", "llama scaled rope", "qwen2")


def policy(name: str, seed: int = 0) -> Any:
    """In training mode as a learner leaves it, with dropout configured: a decoder must not care."""
    torch.manual_seed(seed)
    model = MAKERS[name]()
    shake(model)
    return model.train()


def shake(model: Any, size: float = 0.1) -> None:
    """Move every weight, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)


def mixed_prompts(side: str = "left") -> tuple[Tensor, Tensor]:
    """Four prompts of 7, 5, 2 and 1 tokens, padded with a real token's id so that only the mask tells."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCABULARY, (4, 7), generator=draw)
    lengths = torch.tensor([[7], [5], [2], [1]])
    place = torch.arange(7)
    return ids, (place >= 7 - lengths if side == "left" else place < lengths).long()


@torch.no_grad()
def forward_logits(model: Any, ids_BP: Tensor, mask_BP: Tensor, answer_BT: Tensor) -> Tensor:
    """What the module's own forward of the whole sequence predicts for every answer token, [B, T, V].

    Prompts are left-padded, as `mixed_prompts` makes them; the answers' padding is to the right, where nothing sees it.
    """
    was = model.training
    model.eval()
    if model.config.is_encoder_decoder:
        to_the_left = mask_BP.argsort(
            dim=1, descending=True, stable=True
        )  # BART counts positions with the padding
        ids_BP, mask_BP = ids_BP.gather(1, to_the_left), mask_BP.gather(1, to_the_left)
        start = torch.full_like(answer_BT[:, :1], model.config.decoder_start_token_id)
        before_BT = torch.cat([start, answer_BT[:, :-1]], dim=1)
        logits = model(input_ids=ids_BP, attention_mask=mask_BP, decoder_input_ids=before_BT).logits
    else:
        mask_BL = torch.cat([mask_BP, torch.ones_like(answer_BT)], dim=1)
        place_BL = (mask_BL.cumsum(1) - 1).clamp_min(0)
        ids_BL = torch.cat([ids_BP, answer_BT], dim=1)
        logits = model(ids_BL, attention_mask=mask_BL, position_ids=place_BL).logits
        logits = logits[:, ids_BP.shape[1] - 1 : -1]
    model.train(was)
    return logits.float()
