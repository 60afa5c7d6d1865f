"""A VQA model and its tokenizers, made from a configuration or read from a saved folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedConfig, PreTrainedTokenizerFast

from fmray.config.answers import LanguageModelConfig, VqaModelConfig
from fmray.config.schema import TowerConfig
from fmray.errors import CheckpointError, ConfigError
from fmray.models.answer_tokenizer import FROM_ANSWERS, learn_tokenizer
from fmray.models.freezing import CROSS_ATTENTION
from fmray.models.loading import check_complete
from fmray.models.towers import (
    DROPOUT_KEYS,
    load_tokenizer,
    locate,
    locate_model,
    pretrained_tower,
    tower_config,
)
from fmray.models.vqa import VqaConfig, VqaModel
from fmray.types import Dialogue

ANSWER_TOKENIZER = "answer_tokenizer"
"""Folder, in a saved model's, of the decoder's tokenizer; the question's is the saved folder's own."""

VqaParts = tuple[VqaModel, PreTrainedTokenizerFast, PreTrainedTokenizerFast]
"""The model, the question's tokenizer, the answer's."""


def build_parts(config: VqaModelConfig, dialogues: Sequence[Dialogue]) -> VqaParts:
    """The model that a configuration asks for, in fp32 on the CPU; raises ConfigError with the key.

    dialogues: what a tokenizer is learned from, where the configuration wants that.
    With `checkpoint` its own picture preparation and lengths hold, as they are saved with it.
    """
    if config.checkpoint is not None:
        folder = Path(locate_model(config.checkpoint, "model.checkpoint"))
        return open_parts(folder, config.dropout)
    vision_config = tower_config(config.vision, "model.vision", config.dropout)
    if hasattr(vision_config, "vision_use_head"):
        vision_config.vision_use_head = False  # SigLIP's pooling head: its tokens are read, not their pool
    _check_size(vision_config, config)
    text_config = tower_config(config.text, "model.text", config.dropout)
    question_tokenizer = load_tokenizer(config.text, "model.text")
    _check_vocabulary("model.text.source", config.text.source, question_tokenizer, text_config)
    _check_length("model.max_question_tokens", config.max_question_tokens, text_config)
    layers = text_config.num_hidden_layers
    if -config.text_layer > layers + 1:
        cure = f"the question's tower has {layers} layers and its embeddings: -{layers + 1} at the lowest"
        raise ConfigError("model.text_layer", config.text_layer, cure)
    decoder_config, answer_tokenizer = _speaker(config, dialogues)
    whole = VqaConfig(
        vision_config=vision_config,
        text_config=text_config,
        decoder_config=decoder_config,
        text_layer=config.text_layer,
        fusion=config.fusion,
        image=config.image.model_dump(mode="json"),
        hold_batch_norm=config.vision.pretrained,
        max_question_tokens=config.max_question_tokens,
        max_answer_tokens=config.max_answer_tokens,
    )
    model = VqaModel(
        whole,
        pretrained_tower(config.vision, vision_config, "model.vision") if config.vision.pretrained else None,
        pretrained_tower(config.text, text_config, "model.text") if config.text.pretrained else None,
        _pretrained_decoder(config.decoder, decoder_config) if config.decoder.pretrained else None,
    )
    return model, question_tokenizer, answer_tokenizer


def _speaker(
    config: VqaModelConfig, dialogues: Sequence[Dialogue]
) -> tuple[PreTrainedConfig, PreTrainedTokenizerFast]:
    """The decoder's configuration and its tokenizer, made to fit each other."""
    wanted = config.decoder
    as_tower = TowerConfig(source=wanted.source, pretrained=wanted.pretrained, overrides=wanted.overrides)
    decoder_config = tower_config(as_tower, "model.decoder", config.dropout)
    if decoder_config.model_type != "gpt2":
        cure = f"is a {decoder_config.model_type} model: the VQA model's decoder is GPT-2, which takes cross-attention"
        raise ConfigError("model.decoder.source", wanted.source, cure)
    if wanted.tokenizer is None and wanted.source.startswith("arch:"):
        cure = f"{wanted.source} has no tokenizer: name one, as asset:gpt2_tokenizer, or answers to learn one"
        raise ConfigError("model.decoder.tokenizer", None, cure)
    if wanted.tokenizer == FROM_ANSWERS:
        if wanted.pretrained:
            cure = "a pretrained decoder speaks its own tokens: leave it out, or set pretrained=false"
            raise ConfigError("model.decoder.tokenizer", FROM_ANSWERS, cure)
        tokenizer = learn_tokenizer(turn.answer for dialogue in dialogues for turn in dialogue.turns)
    else:
        tokenizer = load_tokenizer(TowerConfig(source=wanted.tokenizer or wanted.source), "model.decoder")
    if tokenizer.eos_token_id is None:
        cure = "has no end-of-text token, so an answer never ends"
        raise ConfigError("model.decoder.tokenizer", wanted.tokenizer or wanted.source, cure)
    if not wanted.pretrained and "vocab_size" not in wanted.overrides:
        decoder_config.vocab_size = len(tokenizer)
    _check_vocabulary(
        "model.decoder.tokenizer", wanted.tokenizer or wanted.source, tokenizer, decoder_config, wanted.source
    )
    _check_length("model.max_answer_tokens", config.max_answer_tokens, decoder_config)
    decoder_config.add_cross_attention = True
    decoder_config.eos_token_id = tokenizer.eos_token_id
    begins = tokenizer.bos_token_id
    decoder_config.bos_token_id = tokenizer.eos_token_id if begins is None else begins
    return decoder_config, tokenizer


def _check_vocabulary(
    key: str, source: str, tokenizer: PreTrainedTokenizerFast, tower: PreTrainedConfig, of: str | None = None
) -> None:
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= tower.vocab_size:
        cure = (
            f"towers of different tokenizers: {source} has a token number {highest}, "
            f"but {of or f'its {tower.model_type} model'} only {tower.vocab_size} embeddings"
        )
        raise ConfigError(key, source, cure)


def _check_length(key: str, tokens: int, tower: PreTrainedConfig) -> None:
    places = getattr(tower, "max_position_embeddings", None)
    if places is not None and tokens > places:
        raise ConfigError(key, tokens, f"the {tower.model_type} model reads {places} tokens at most")


def _check_size(vision: PreTrainedConfig, config: VqaModelConfig) -> None:
    """A transformer has a position for each patch; convolutional towers take any size."""
    size = getattr(vision, "image_size", None)
    if hasattr(vision, "patch_size") and isinstance(size, int) and size != config.image.size:
        cure = f"{config.vision.source} takes {size}: set this, or model.vision.overrides.image_size from scratch"
        raise ConfigError("model.image.size", config.image.size, cure)


def _pretrained_decoder(wanted: LanguageModelConfig, config: PreTrainedConfig) -> GPT2LMHeadModel:
    """GPT-2 with its saved weights and a fresh cross-attention; any other missing weight is an error."""
    try:
        model, info = GPT2LMHeadModel.from_pretrained(
            locate(wanted.source, "model.decoder.source"),
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        cure = f"cannot be loaded: {str(error).splitlines()[0]}"
        raise ConfigError("model.decoder.source", wanted.source, cure) from None
    missing = sorted(name for name in info["missing_keys"] if not CROSS_ATTENTION & set(name.split(".")))
    if missing:
        cure = f"does not hold the decoder's weights: {', '.join(missing[:3])}, …"
        raise ConfigError("model.decoder.source", wanted.source, cure)
    return model


def _set_dropout(config: VqaConfig, dropout: float | None) -> None:
    if dropout is None:
        return
    for part in (config.vision_config, config.text_config, config.decoder_config):
        for name in DROPOUT_KEYS:
            if hasattr(part, name):
                setattr(part, name, dropout)


def open_parts(folder: Path, dropout: float | None = None) -> VqaParts:
    """A saved model and its tokenizers, on the CPU; raises CheckpointError where it cannot be loaded."""
    try:
        config = VqaConfig.from_pretrained(folder)
        _set_dropout(config, dropout)
        model, info = VqaModel.from_pretrained(
            folder, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        question_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        answer_tokenizer = AutoTokenizer.from_pretrained(folder / ANSWER_TOKENIZER, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from None
    check_complete(info, str(folder))
    return model, question_tokenizer, answer_tokenizer
