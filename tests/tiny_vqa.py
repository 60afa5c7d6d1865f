"""A tiny real VQA model from scratch, with tokenizers of a few words, and dialogues to ask it; no download needed."""

from __future__ import annotations

from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    GPT2Config,
    MobileNetV2Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
)

from fmray.config.schema import ImageConfig
from fmray.models.vqa import VqaConfig, VqaModel
from fmray.models.vqa_answering import VqaAnswering
from fmray.types import Dialogue, Pictures, Turn

SIDE = 16
"""Pixels of a picture's side."""
QUESTION_WORDS = "what color shape is the a there circle square red green blue how many ? left right"
ANSWER_WORDS = "red green blue circle square triangle yes no one two left right"


def word_tokenizer(words: str, special: dict[str, str], frame: bool) -> PreTrainedTokenizerFast:
    """Words by whitespace; `special` maps transformers' names of special tokens to them; `frame`: [CLS] … [SEP]."""
    vocabulary = {
        word: number for number, word in enumerate([*dict.fromkeys(special.values()), *words.split()])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if frame:
        ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def question_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return word_tokenizer(QUESTION_WORDS, special, frame=True)


def answer_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind: one special token, and none to pad with."""
    special = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
    return word_tokenizer(ANSWER_WORDS, special, frame=False)


def tiny_vqa_config(
    fusion: Literal["concat", "mean"] = "concat", *, dropout: float = 0.0, convolutional: bool = False
) -> VqaConfig:
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    vision: PreTrainedConfig = ViTConfig(image_size=SIDE, patch_size=8, **shape)
    if convolutional:
        vision = MobileNetV2Config(image_size=SIDE, depth_multiplier=0.05, min_depth=8)
    return VqaConfig(
        vision_config=vision,
        text_config=BertConfig(
            vocab_size=len(question_tokenizer()), max_position_embeddings=16, pad_token_id=0, **shape
        ),
        decoder_config=GPT2Config(
            vocab_size=len(answer_tokenizer()),
            n_embd=24,
            n_layer=2,
            n_head=2,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        ),
        fusion=fusion,
        image=ImageConfig(size=SIDE, normalize="half").model_dump(mode="json"),
        max_question_tokens=12,
        max_answer_tokens=5,
    )


def tiny_vqa(
    seed: int = 0,
    fusion: Literal["concat", "mean"] = "concat",
    *,
    dropout: float = 0.0,
    convolutional: bool = False,
) -> VqaAnswering:
    """A VQA model of some ten thousand weights, in training mode, with its tokenizers."""
    torch.manual_seed(seed)
    model = VqaModel(tiny_vqa_config(fusion, dropout=dropout, convolutional=convolutional))
    with torch.no_grad():  # GPT-2's own start is so small that every answer would be the same
        for parameter in model.decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return VqaAnswering(model.train(), question_tokenizer(), answer_tokenizer())


def pictures(count: int = 3, seed: int = 0) -> Pictures:
    """Random pictures "0.png", "1.png", …"""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    return Pictures(tuple(f"{number}.png" for number in range(count)), pixels_NCHW=pixels)


def asked(name: str, picture: str, question: str, answer: str, kind: str = "") -> Dialogue:
    """One question about one picture."""
    return Dialogue(name, (picture,), (Turn(("", question), answer),), (answer,), kind)


def dialogues(count: int = 6, pictures: int = 3) -> list[Dialogue]:
    """Questions of three to seven words and answers of one to three, several to a picture."""
    questions = [
        "what color is the circle ?",
        "is there a square ?",
        "how many circle ?",
        "is the red circle left ?",
    ]
    answers = ["red", "yes", "two", "left circle", "blue square right"]
    return [
        asked(
            str(number),
            f"{number % pictures}.png",
            questions[number % len(questions)],
            answers[number % len(answers)],
        )
        for number in range(count)
    ]
