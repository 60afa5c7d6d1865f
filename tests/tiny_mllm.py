"""A tiny multimodal LLM with a tokenizer of its own, and dialogues about random pictures; no download needed."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MobileNetV2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
)

from fmray.config.schema import ImageConfig
from fmray.models.mllm import Mllm, MllmConfig
from fmray.models.mllm_answering import MllmAnswering
from fmray.models.mllm_parts import token_grid
from fmray.models.towers import new_tower
from fmray.types import Dialogue, Pictures, Turn

CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nyou see.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = (
    "what color is it?",
    "what shape is this?",
    "is there a circle?",
    "is it big?",
    "how many are there?",
)
ANSWERS = ("red", "a blue circle", "no", "yes", "two")


def mllm_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE: <|endoftext|> 0 (start and end), <|im_start|> 1, <|im_end|> 2."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [*QUESTIONS, *ANSWERS, "user", "assistant", "system", "you see."]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    made.chat_template = CHAT if chat else None
    return made


def tiny_language(kind: str = "llama", dropout: float = 0.0) -> PreTrainedModel:
    """Four blocks of width 32 with tied embeddings; Llama and Mistral with grouped queries."""
    if kind == "gpt2":
        noise = {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
        sizes = {"n_positions": 512, "n_embd": 32, "n_layer": 4, "n_head": 4}
        return GPT2LMHeadModel(GPT2Config(vocab_size=320, bos_token_id=0, eos_token_id=0, **sizes, **noise))
    of_model, of_config = (
        (MistralForCausalLM, MistralConfig) if kind == "mistral" else (LlamaForCausalLM, LlamaConfig)
    )
    return of_model(
        of_config(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    )


def tiny_mllm(
    seed: int = 0,
    language: str = "llama",
    fusion: str = "concat",
    projector: str = "mlp",
    vision: str = "vit",
    template: str = "chat",
    loud: bool = True,
    **changes: Any,
) -> MllmAnswering:
    """ViT (or MobileNetV2) of 16 pixels, a projector, four blocks of a language model; in eval mode.

    `loud` draws the embeddings larger and opens the gates, so that answers differ from one another.
    """
    torch.manual_seed(seed)
    if vision == "vit":
        shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        noise = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        vision_config: Any = ViTConfig(image_size=16, patch_size=4, **shape, **noise)
        size = 16
    else:
        vision_config, size = MobileNetV2Config(depth_multiplier=0.1, finegrained_output=True), 64
    tower, speaker = new_tower(vision_config), tiny_language(language)
    keys: dict[str, Any] = {
        "vision_layer": -1,
        "cross_attention_every": 2,
        "max_tokens": 200,
        "max_answer_tokens": 8,
        **changes,
    }
    config = MllmConfig(
        vision_config=vision_config,
        text_config=speaker.config,
        image=ImageConfig(size=size, normalize="half").model_dump(mode="json"),
        grid=token_grid(tower, vision_config, size, keys["vision_layer"]),
        projector=projector,  # type: ignore[arg-type]
        fusion=fusion,  # type: ignore[arg-type]
        template=template,  # type: ignore[arg-type]
        **keys,
    )
    model = Mllm(config, tower, speaker).eval()
    if loud:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_gate"):
                    parameter.fill_(0.7)
                elif parameter.dim() > 1 and name.startswith(("language", "projector")):
                    parameter.mul_(5)
    return MllmAnswering(model, mllm_tokenizer())


def pictures(count: int, seed: int = 0, size: int = 16) -> Pictures:
    """Random ones, called "0.png", "1.png", …"""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=draw, dtype=torch.uint8)
    return Pictures(tuple(f"{number}.png" for number in range(count)), pixels_NCHW=pixels)


def about(picture: int | None, number: int, *, turns: int = 1, answer: str | None = None) -> Dialogue:
    """Questions about a picture (or none); the picture stands before the first of them."""
    said = []
    for turn in range(turns):
        question = QUESTIONS[(number + turn) % len(QUESTIONS)]
        parts = ("", question) if turn == 0 and picture is not None else (question,)
        said.append(Turn(parts, ANSWERS[(number + turn) % len(ANSWERS)] if answer is None else answer))
    keys = () if picture is None else (f"{picture}.png",)
    return Dialogue(f"{picture}/{number}", keys, tuple(said))


def some_dialogues(pictures: int = 2, questions: int = 3) -> list[Dialogue]:
    """Some questions about each picture, a talk of two turns, and one without a picture."""
    asked = [about(picture, number) for picture in range(pictures) for number in range(questions)]
    return [*asked, about(0, 1, turns=2), about(None, 2)]
