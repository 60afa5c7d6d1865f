"""What `fmray benchmark serve` serves, saved as people save it: a CLIP of transformers, the emoji CLIP, a VQA model, an LLM.

Weights are fresh where a part only measures time: a matrix costs the same whatever stands in it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from fmray.assets import fetch
from fmray.benchmarks.vqa_bench import made_up, tiny_vqa, write_tiny_models
from fmray.benchmarks.workbench import END, START
from fmray.config.answer_recipes import vqa_easy
from fmray.config.answers import LanguageModelConfig, MllmModelConfig, VqaModelConfig
from fmray.config.recipes import clip_emoji, clip_tiny
from fmray.config.schema import ImageConfig, TowerConfig
from fmray.data.dialogues import DialogueSource, open_dialogues
from fmray.models.answering import Answering
from fmray.models.clip import build_dual_encoder
from fmray.models.mllm_answering import build_mllm
from fmray.models.preparation import save_picture_preparation
from fmray.models.saved import save_dual_encoder
from fmray.models.towers import tower_width
from fmray.models.vqa_answering import build_vqa

EMOJI_SIDE = 96
"""Pixels at which the small emoji CLIP looks; the recipe's 192 cost four times as much."""


def write_clip(folder: Path, *, real: bool) -> None:
    """transformers' CLIPModel, ViT-B/32 (its configuration's own defaults), with all that its processor reads."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    special = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    text: dict[str, object] = {"vocab_size": END + 1, **special}
    vision: dict[str, object] = {}
    if not real:
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        text, vision = text | small, {**small, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    letters = [chr(code) for code in range(33, 127)]
    words = {word: number for number, word in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    words |= {"<|startoftext|>": START, "<|endoftext|>": END}
    tokenizer = CLIPTokenizer(vocab=words, merges=[])
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    size = model.config.vision_config.image_size
    save_picture_preparation(ImageConfig(size=size, fit="crop", normalize="clip"), folder)


def write_emoji_clip(folder: Path, *, real: bool) -> None:
    """The recipe clip_emoji's towers before their first step, for pictures of 96 pixels; clip_tiny's where sizes are small."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    recipe = clip_emoji() if real else clip_tiny()
    side = EMOJI_SIDE if real else recipe.model.image.size
    changes: dict[str, object] = {"image": recipe.model.image.replace(size=side)}
    if real:
        changes["warm_start"] = "none"
    model, tokenizer = build_dual_encoder(recipe.model.replace(**changes), recipe.objective, recipe.data)
    save_dual_encoder(model.eval(), tokenizer, folder)


def write_plain_emoji_clip(folder: Path) -> None:
    """The same towers as transformers keeps them, BatchNorm and all: a VisionTextDualEncoderModel, for pictures of 96 pixels."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    vision, text = (AutoModel.from_pretrained(fetch(name)) for name in ("mobilenet_v2", "minilm"))
    vision.config.hidden_size = tower_width(vision.config)  # the class asks for it by this name
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=clip_emoji().model.embed_dim
    )
    model = VisionTextDualEncoderModel(config, vision_model=vision, text_model=text)
    config.architectures = ["VisionTextDualEncoderModel"]
    config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_picture_preparation(ImageConfig(size=EMOJI_SIDE, fit="crop", normalize="imagenet"), folder)


def write_vqa(folder: Path, questions: DialogueSource, scratch: Path, *, real: bool) -> None:
    """The recipe vqa_easy's model before its first step: it says tokens until there is no room for more."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = vqa_easy().model
    assert isinstance(model, VqaModelConfig)
    if not real:
        write_tiny_models(scratch)
        model = tiny_vqa(model.replace(text_layer=-1), scratch)  # its tower has one layer
    dialogues = [questions[number] for number in range(min(len(questions), 2000))]
    _save(build_vqa(model, dialogues), folder)


def write_llm(folder: Path, scratch: Path, *, real: bool) -> None:
    """MobileNetV2 and SmolLM2-135M with a fresh projector, answers of up to 8 tokens; tiny ones where sizes are small."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    if real:
        config = MllmModelConfig(image=ImageConfig(size=128), max_tokens=128, max_answer_tokens=8)
    else:
        if not (scratch / "language").is_dir():
            write_tiny_models(scratch)
        small = {"image_size": 32, "depth_multiplier": 0.05, "min_depth": 8}
        config = MllmModelConfig(
            vision=TowerConfig(source="arch:mobilenet_v2", pretrained=False, overrides=small),
            language=LanguageModelConfig(source=str(scratch / "language")),
            image=ImageConfig(size=32),
            template="plain",
            max_tokens=32,
            max_answer_tokens=4,
        )
    _save(build_mllm(config), folder)


def _save(answering: Answering, folder: Path) -> None:
    answering.model.eval()
    answering.save(answering.model.state_dict(), folder)


def benchmark_questions(*, real: bool, pictures: int) -> DialogueSource:
    """easy-VQA's test split, or made-up questions where sizes are small."""
    return open_dialogues(vqa_easy().data.source, "test") if real else made_up("test", pictures)
