"""The parts of a multimodal LLM as a configuration asks for them: picture tower, language model, tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
)

from fmray.config.answers import LanguageModelConfig, MllmModelConfig
from fmray.config.schema import ImageConfig, TowerConfig
from fmray.errors import ConfigError
from fmray.models.clip import DualEncoderConfig
from fmray.models.mllm import Mllm, MllmConfig
from fmray.models.saved import load_any_clip
from fmray.models.towers import locate, locate_model, new_tower, pretrained_tower, tower_config


def new_mllm(config: MllmModelConfig) -> tuple[Mllm, PreTrainedTokenizerFast]:
    """Tower and language model as they come, projector (and gated layers) fresh; fp32 on the CPU."""
    vision, vision_config, folded, own_image = _vision(config.vision)
    # a dual encoder's tower knows its own preparation; one that the configuration names is obeyed
    image = own_image if own_image is not None and config.image == ImageConfig() else config.image
    if config.vision_layer != -1 and (config.vision_layer > -1 or not hasattr(vision_config, "patch_size")):
        cure = "is counted from the end (-1, -2, …), and a convolutional tower has its last map alone"
        raise ConfigError("model.vision_layer", config.vision_layer, cure)
    language = _language(config.language)
    tokenizer = _tokenizer(config.language)
    model_config = MllmConfig(
        vision_config=vision_config,
        text_config=language.config,
        image=image.model_dump(mode="json"),
        vision_layer=config.vision_layer,
        grid=token_grid(vision, vision_config, image.size, config.vision_layer),
        projector=config.projector.kind,
        shuffle=config.projector.shuffle,
        fusion=config.fusion,
        cross_attention_every=config.cross_attention_every,
        hold_batch_norm=config.vision.pretrained,
        folded_batch_norm=folded,
        template=config.template,
    )
    return Mllm(model_config, vision, language), tokenizer


def check_lengths(model: Mllm) -> None:
    """Raises ConfigError where a dialogue would be longer than the language model or than a row."""
    config, text = model.config, model.config.text_config
    positions = text.max_position_embeddings
    if config.max_tokens + config.max_answer_tokens > positions:
        cure = f"with max_answer_tokens={config.max_answer_tokens} it is more than the language model's {positions} positions"
        raise ConfigError("model.max_tokens", config.max_tokens, cure)
    if config.fusion == "concat" and config.picture_tokens >= config.max_tokens:
        cure = f"a picture alone takes {config.picture_tokens} tokens; raise it or shorten pictures (pixel_shuffle)"
        raise ConfigError("model.max_tokens", config.max_tokens, cure)
    if config.row_tokens is not None and config.row_tokens < config.max_tokens:
        cure = f"must hold the longest dialogue: at least model.max_tokens={config.max_tokens}"
        raise ConfigError("model.row_tokens", config.row_tokens, cure)


# ------------------------------------------------------------------------------------------------------------------ the tower


def _vision(
    tower: TowerConfig,
) -> tuple[PreTrainedModel, PreTrainedConfig, bool, ImageConfig | None]:
    """The tower, its configuration, whether its batch norms are folded, and its preparation where it comes with one."""
    key = "model.vision"
    if not tower.source.startswith("arch:"):
        location = locate_model(tower.source, f"{key}.source")
        if isinstance(_config(location, f"{key}.source"), CLIPConfig | SiglipConfig | DualEncoderConfig):
            if not tower.pretrained or tower.overrides:
                cure = "a dual encoder's tower is taken as it is: pretrained, without overrides"
                raise ConfigError(f"{key}.source", tower.source, cure)
            dual, _ = load_any_clip(location)
            return dual.vision, dual.config.vision_config, dual.config.folded_batch_norm, dual.image
    config = tower_config(tower, key, None)
    vision = pretrained_tower(tower, config, key) if tower.pretrained else new_tower(config)
    return vision, config, False, None


def _config(location: str, key: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(key, location, f"cannot be loaded: {reason}") from None


@torch.no_grad()
def token_grid(vision: PreTrainedModel, config: PreTrainedConfig, size: int, layer: int) -> tuple[int, int]:
    """Rows and columns of a picture's tokens, told by looking at a black one; a class token and registers do not count."""
    key, training = "model.image.size", vision.training
    vision.eval()
    try:
        outputs = vision(
            pixel_values=torch.zeros(1, 3, size, size),
            **({"output_hidden_states": True} if layer != -1 else {}),
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(key, size, f"the picture tower does not take it: {reason}") from None
    vision.train(training)
    if layer != -1 and -layer > len(outputs.hidden_states):
        cure = f"the tower has {len(outputs.hidden_states)} hidden layers"
        raise ConfigError("model.vision_layer", layer, cure)
    tokens = outputs.last_hidden_state
    if tokens.dim() == 4:
        return tokens.shape[2], tokens.shape[3]
    side = size // int(getattr(config, "patch_size", 0) or size + 1)
    if not 0 < side * side <= tokens.shape[1]:
        cure = f"the picture tower makes {tokens.shape[1]} tokens of it, which are no square of patches"
        raise ConfigError(key, size, cure)
    return side, side


# --------------------------------------------------------------------------------------------------------- the language model


def _language(language: LanguageModelConfig) -> PreTrainedModel:
    key = "model.language"
    config = tower_config(_as_tower(language, language.source), key, None)
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        cure = f"is a {config.model_type} model; take a decoder-only language model"
        raise ConfigError(f"{key}.source", language.source, cure)
    config.is_decoder = True
    if not language.pretrained:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        location = locate_model(language.source, f"{key}.source")
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                location,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{key}.source", language.source, f"cannot be loaded: {reason}") from None
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ConfigError(
                f"{key}.source", language.source, f"does not hold the model's weights: {missing}"
            )
    check_head(model, f"{key}.source", language.source)
    return model


@torch.no_grad()
def check_head(model: PreTrainedModel, key: str, source: str) -> None:
    """Refuse models that do more to a state than multiply it by the output matrix (soft caps, scales)."""
    training = model.training
    model.eval()
    ids = torch.arange(2, 8).view(1, 6) % model.config.vocab_size
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours, theirs = model.get_output_embeddings()(states), model(input_ids=ids, use_cache=False).logits
    model.train(training)
    if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3):
        cure = f"the architecture {model.config.model_type} computes its logits in a way of its own, which is not followed here"
        raise ConfigError(key, source, cure)


def _tokenizer(language: LanguageModelConfig) -> PreTrainedTokenizerFast:
    source = language.tokenizer or language.source
    if source.startswith("arch:"):
        cure = "an architecture has no tokenizer: say where one is"
        raise ConfigError("model.language.tokenizer", language.tokenizer, cure)
    key = "model.language.tokenizer" if language.tokenizer else "model.language.source"
    location = locate(source, key) if language.tokenizer else locate_model(source, key)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(key, source, f"has no tokenizer: {reason}") from None
    return tokenizer


def _as_tower(language: LanguageModelConfig, source: str) -> TowerConfig:
    """What `tower_config` reads."""
    if not source.startswith("arch:"):
        source = locate_model(source, "model.language.source")
    return TowerConfig(source=source, pretrained=language.pretrained, overrides=language.overrides)
