"""Tiny judges on disk: classifiers and taggers of several architectures, random weights, no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from fmray.runtime.pool import Place
from fmray.runtime.weights import LocalWeightStore
from tests.stories import make_tokenizer

HERE = Place(torch.device("cpu"), LocalWeightStore(1))

WORDS = (
    "the",
    "a",
    "film",
    "was",
    "is",
    "good",
    "bad",
    "very",
    "and",
    "dog",
    "don",
    "it",
    "watch",
    "##s",
    *",.!'ts",
)


def save_judge(model: nn.Module, folder: Path, **keys: Any) -> Path:
    """config.json (with more keys) and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(model.config.to_json_string(use_diff=False)) | keys
    (folder / "config.json").write_text(json.dumps(content))
    tensors = {name: value.contiguous() for name, value in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_bert_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def write_roberta_tokenizer(folder: Path) -> None:
    """As the hub's RoBERTas have it: vocab.json and merges.txt alone."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz.,!'", "Ġ", "th", "the", "oo", "ba", "bad"]
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\no o\nb a\nba d\n")


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}


def bert(folder: Path, labels: int = 3, **keys: Any) -> Path:
    torch.manual_seed(1)
    write_bert_tokenizer(folder)
    config = BertConfig(
        vocab_size=40, max_position_embeddings=32, num_labels=labels, initializer_range=0.3, **SIZES
    )
    return save_judge(BertForSequenceClassification(config), folder, **keys)


def distilbert(folder: Path, labels: int = 2, **keys: Any) -> Path:
    torch.manual_seed(2)
    write_bert_tokenizer(folder)
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
    config = DistilBertConfig(vocab_size=40, num_labels=labels, initializer_range=0.3, **sizes)
    return save_judge(DistilBertForSequenceClassification(config), folder, **keys)


def roberta(folder: Path, labels: int = 3, **keys: Any) -> Path:
    torch.manual_seed(3)
    write_roberta_tokenizer(folder)
    config = RobertaConfig(
        vocab_size=45,
        max_position_embeddings=66,
        num_labels=labels,
        initializer_range=0.3,
        type_vocab_size=1,
        **SIZES,
    )
    return save_judge(RobertaForSequenceClassification(config), folder, **keys)


def gpt2(folder: Path, labels: int = 1, **keys: Any) -> Path:
    torch.manual_seed(4)
    make_tokenizer(ends=False).save_pretrained(folder)
    config = GPT2Config(
        vocab_size=128,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        num_labels=labels,
        initializer_range=0.3,
    )
    return save_judge(GPT2ForSequenceClassification(config), folder, **{"pad_token_id": 1} | keys)


def t5(folder: Path, labels: int = 2, **keys: Any) -> Path:
    torch.manual_seed(5)
    make_tokenizer(ends=True).save_pretrained(folder)
    config = T5Config(
        vocab_size=128, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, num_labels=labels,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.classification_head.parameters():
            parameter.normal_(std=0.5)
    return save_judge(model, folder, **keys)


def tagger(folder: Path, labels: Sequence[str] = ("$DELETE", "$KEEP", "$CASE_LOWER")) -> Path:
    torch.manual_seed(6)
    write_bert_tokenizer(folder)
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config = DistilBertConfig(vocab_size=40, initializer_range=0.5, **names, **sizes)
    return save_judge(DistilBertForTokenClassification(config), folder)


FAMILIES = {"bert": bert, "distilbert": distilbert, "roberta": roberta, "gpt2": gpt2, "t5": t5}
