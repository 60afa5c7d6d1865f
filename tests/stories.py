"""Tiny language models with a tokenizer of their own and a small set of prompts, so that whole PPO runs need no download."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fmray.config.rlhf import RlhfConfig
from fmray.models.language import save_language_model
from tests.keys import with_keys

SUBJECTS = ("the dog", "a cat", "my old friend", "the small bird", "our teacher", "that king")
VERBS = ("likes", "hates", "sees", "wants", "remembers")
OBJECTS = ("the sea", "good food", "bad films", "a long story", "the red house", "winter", "music")
TEXTS = [f"{s} {v} {o}" for s in SUBJECTS for v in VERBS for o in OBJECTS]


def make_tokenizer(*, ends: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 256 + a few merges: <pad> 0, </s> 1, <unk> 2; `ends` puts </s> behind each text, as T5's does."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(TEXTS, BpeTrainer(vocab_size=120, special_tokens=special))
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_t5(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A gated T5 with an untied head, dropout 0.1 as T5 ships it."""
    tokenizer = make_tokenizer(ends=True)
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    config = T5Config(
        **{**sizes, **changes},
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(128, config.d_model) * 0.2)
    return _save(model, tokenizer, folder)


def tiny_gpt2(folder: Path, seed: int = 0) -> Path:
    """A GPT-2 with tied embeddings, dropout 0.1 as GPT-2 ships it."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
    )
    return _save(GPT2LMHeadModel(config), make_tokenizer(ends=False), folder)


def tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A Llama with grouped queries and tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return _save(LlamaForCausalLM(config), make_tokenizer(ends=False), folder)


def tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """A BERT without a head, for embeddings."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=128, **sizes), add_pooling_layer=False)
    return _save(model, make_tokenizer(ends=True), folder)


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_language_model(model, weights, tokenizer, folder)
    return folder


def write_prompts(folder: Path) -> Path:
    """`train.jsonl` and `test.jsonl` of beginnings: "the dog likes"."""
    folder.mkdir(parents=True, exist_ok=True)
    beginnings = [f"{s} {v}" for s in SUBJECTS for v in VERBS]
    for split, texts in {"train": beginnings[:24], "test": beginnings[24:]}.items():
        lines = [json.dumps({"prompt": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def story_run(folder: Path, policy: Path, **changes: Any) -> RlhfConfig:
    """A whole PPO run of seconds: 2 iterations over 16 samples, two cheap rewards. Dotted keys change it."""
    keys: dict[str, Any] = {
        "run": {"name": "story", "storage": str(folder / "runs")},
        "runtime": {"threads": 1},
        "report": {"progress": False},
        "prompts": {"source": {"kind": "jsonl", "path": str(write_prompts(folder / "prompts"))}},
        "policy": {"source": str(policy)},
        "rollout": {"batch_size": 16, "request_size": 4, "max_new_tokens": 6},
        "rewards": {
            "letters": {"kind": "python", "function": "tests.stories:letter_share", "pool": {"replicas": 0}},
            "repetition": {"kind": "repetition", "weight": 0.5},
        },
        "ppo": {"mini_batch_size": 8, "epochs": 2},
        "optimizer": {"lr": 1e-3},
        "train": {"iterations": 2, "evaluate_prompts": 4, "samples_every": 1},
    }
    keys = with_keys(keys, changes, ".")
    return RlhfConfig.model_validate(keys)


def letter_share(texts: list[str], prompts: list[str]) -> list[float]:
    """A reward that can be learned in seconds: the share of characters that are an e, a or i."""
    return [sum(character in "eai" for character in text) / max(1, len(text)) for text in texts]


def letters_or_failure(texts: list[str], prompts: list[str]) -> list[float]:
    """`letter_share` that has no answer for texts of an odd number of characters."""
    return [
        share if len(text) % 2 == 0 else float("nan")
        for text, share in zip(texts, letter_share(texts, prompts), strict=True)
    ]


def never(texts: list[str], prompts: list[str]) -> list[float]:
    """A reward that takes an hour."""
    time.sleep(3600)
    return [0.0] * len(texts)
