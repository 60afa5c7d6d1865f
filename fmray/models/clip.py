"""The dual encoder: two towers, two projections, a temperature; one saved folder that `from_pretrained` loads.

B rows  T tokens  C,H,W pixels  F width of a tower  D width of the shared space
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from fmray.config.schema import DataConfig, ImageConfig, ModelConfig, ObjectiveConfig
from fmray.errors import ConfigError
from fmray.models.preparation import normalized_pixels
from fmray.models.towers import (
    Pooling,
    default_pooling,
    fold_batch_norm,
    hold_batch_norm,
    is_convolutional,
    load_tokenizer,
    new_tower,
    pool,
    pretrained_tower,
    sub_config,
    tower_config,
    tower_width,
)

MAX_LOG_SCALE = math.log(100.0)
"""CLIP's bound on the temperature (Radford et al. 2021, §2.5): logits are scaled by 100 at most."""

Projection = Literal["linear", "affine", "identity", "from_identity"]
"""From a tower's width to the shared space: a matrix, a matrix and a bias, nothing, or a matrix that starts as nothing."""


class DualEncoderConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """What a saved dual encoder is made of."""

    model_type = "fmray_dual_encoder"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (transformers' contract)

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        embed_dim: int = 512,
        vision_pooling: Pooling = "cls",
        text_pooling: Pooling = "mean",
        vision_projection: Projection = "linear",
        text_projection: Projection = "linear",
        objective: Literal["infonce", "siglip"] = "infonce",
        initial_temperature: float = 0.07,
        dropout: float = 0.0,
        hold_batch_norm: bool = True,
        folded_batch_norm: bool = False,
        max_tokens: int = 77,
        pad_to_max: bool = False,
        **rest: Any,
    ) -> None:
        self.vision_config = sub_config(vision_config, "vit")
        self.text_config = sub_config(text_config, "bert")
        self.image = image or ImageConfig().model_dump(mode="json")
        self.embed_dim = embed_dim
        self.vision_pooling, self.text_pooling = vision_pooling, text_pooling
        self.vision_projection, self.text_projection = vision_projection, text_projection
        self.objective = objective
        self.initial_temperature = initial_temperature
        self.dropout = dropout
        self.hold_batch_norm = hold_batch_norm
        self.folded_batch_norm = folded_batch_norm
        self.max_tokens = max_tokens
        self.pad_to_max = pad_to_max
        super().__init__(**rest)


@dataclass
class DualEncoderOutput(ModelOutput):  # type: ignore[misc]  # transformers is untyped here
    """Unit vectors of both sides and what the loss scales them by."""

    image_embeds: Tensor | None = None
    """float32 [B, D], norm 1."""
    text_embeds: Tensor | None = None
    """float32 [B, D], norm 1."""
    logit_scale: Tensor | None = None
    """float32 scalar, already exponentiated, at most 100."""
    logit_bias: Tensor | None = None
    """float32 scalar; SigLIP only."""


class Temperature(nn.Module):
    """The learnable scale (and SigLIP's bias) of the logits; a module, so that ZeRO-3 gathers it in `forward`."""

    def __init__(self, temperature: float, with_bias: bool) -> None:
        super().__init__()
        # one element, not zero dimensions: DeepSpeed's broadcast of the weights cannot send a scalar
        self.log_scale = nn.Parameter(torch.tensor([math.log(1.0 / temperature)]))
        self.bias = nn.Parameter(torch.tensor([-10.0])) if with_bias else None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        # the bound inside the graph holds under any sharding; CLIP clamps the parameter after the step instead
        scale = self.log_scale.float().clamp(max=MAX_LOG_SCALE).exp().squeeze(0)
        return scale, None if self.bias is None else self.bias.float().squeeze(0)


class DualEncoder(PreTrainedModel):  # type: ignore[misc]
    """Pictures and captions into one space. Every parameter is read inside `forward` (ZeRO-3's rule)."""

    config_class = DualEncoderConfig
    base_model_prefix = "dual_encoder"
    main_input_name = "pixels_BCHW"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []  # noqa: RUF012

    def __init__(
        self,
        config: DualEncoderConfig,
        vision: PreTrainedModel | None = None,
        text: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.vision = vision if vision is not None else new_tower(config.vision_config)
        self.text = text if text is not None else new_tower(config.text_config)
        if config.folded_batch_norm:
            fold_batch_norm(self.vision)
        self._memory_format = torch.contiguous_format
        if is_convolutional(config.vision_config):
            self._memory_format = torch.channels_last
            self.vision.to(memory_format=self._memory_format)
        self.vision_projection = _projection(
            config.vision_projection, config.vision_config, config.embed_dim, "vision"
        )
        self.text_projection = _projection(
            config.text_projection, config.text_config, config.embed_dim, "text"
        )
        self.dropout = nn.Dropout(config.dropout)
        self.temperature = Temperature(config.initial_temperature, with_bias=config.objective == "siglip")
        self.image = ImageConfig.model_validate(config.image)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Only our own layers: the towers come initialised by their own classes."""
        if not isinstance(module, nn.Linear) or module not in (self.vision_projection, self.text_projection):
            return
        nn.init.normal_(module.weight, std=module.in_features**-0.5)  # CLIP's scale for its projections
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if module is self.text_projection and self.config.text_projection == "from_identity":
            nn.init.eye_(module.weight)

    def train(self, mode: bool = True) -> DualEncoder:
        super().train(mode)
        if self.config.hold_batch_norm:
            hold_batch_norm(self)
        return self

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 pixels [B, 3, H, W] (or float in 0..1) to unit vectors, float32 [B, D]."""
        features_BF = self.dropout(self.image_features(pixels_BCHW))
        return F.normalize(self.vision_projection(features_BF).float(), dim=-1)

    def image_features(self, pixels_BCHW: Tensor) -> Tensor:
        """The vision tower's pooled output, [B, F], before the projection."""
        pixels_BCHW = normalized_pixels(pixels_BCHW, self.image).contiguous(memory_format=self._memory_format)
        return pool(self.vision(pixel_values=pixels_BCHW), self.config.vision_pooling)

    def encode_text(self, token_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Token ids and mask, int64 [B, T], to unit vectors, float32 [B, D]."""
        mask = (
            None if self.config.pad_to_max else mask_BT
        )  # SigLIP was trained without a mask, on padded texts
        outputs = self.text(input_ids=token_ids_BT, attention_mask=mask)
        features_BF = self.dropout(pool(outputs, self.config.text_pooling, mask_BT))
        return F.normalize(self.text_projection(features_BF).float(), dim=-1)

    def logit_scale_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Scalars that turn a cosine into a logit: scale·cosine + bias."""
        scale, bias = self.temperature()
        return scale, bias

    def forward(self, pixels_BCHW: Tensor, token_ids_BT: Tensor, mask_BT: Tensor) -> DualEncoderOutput:
        """Both sides of a batch of pairs; no loss here: it needs the other ranks (`objectives.contrastive`)."""
        image_BD = self.encode_image(pixels_BCHW)
        text_BD = self.encode_text(token_ids_BT, mask_BT)
        scale, bias = self.logit_scale_and_bias()
        return DualEncoderOutput(
            image_embeds=image_BD, text_embeds=text_BD, logit_scale=scale, logit_bias=bias
        )


def _projection(kind: str, tower: PreTrainedConfig, embed_dim: int, side: str) -> nn.Module:
    width = tower_width(tower)
    if kind in ("identity", "from_identity") and width != embed_dim:
        raise ConfigError(
            "model.embed_dim", embed_dim, f"must be {width}, the {side} tower's width, with {kind}"
        )
    return nn.Identity() if kind == "identity" else nn.Linear(width, embed_dim, bias=kind == "affine")


AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig)
AutoModel.register(DualEncoderConfig, DualEncoder)


# ---------------------------------------------------------------------------------------------------------- building


def build_dual_encoder(
    model: ModelConfig, objective: ObjectiveConfig, data: DataConfig
) -> tuple[DualEncoder, PreTrainedTokenizerFast]:
    """The model and tokenizer that a configuration asks for, in fp32 on the CPU."""
    if model.checkpoint is not None:
        from fmray.models.saved import load_any_clip  # saved.py builds on this file

        return load_any_clip(model.checkpoint)
    vision_config = tower_config(model.vision, "model.vision", model.tower_dropout)
    text_config = tower_config(model.text, "model.text", model.tower_dropout)
    default_temperature = 0.1 if objective.kind == "siglip" else 0.07
    config = DualEncoderConfig(
        vision_config=vision_config,
        text_config=text_config,
        image=model.image.model_dump(mode="json"),
        embed_dim=model.embed_dim,
        vision_pooling=default_pooling(vision_config)
        if model.vision.pooling == "auto"
        else model.vision.pooling,
        text_pooling=default_pooling(text_config) if model.text.pooling == "auto" else model.text.pooling,
        vision_projection=model.vision_projection,
        text_projection=model.text_projection,
        objective=objective.kind,
        initial_temperature=objective.temperature or default_temperature,
        dropout=model.dropout,
        hold_batch_norm=model.vision.pretrained,
        folded_batch_norm=model.fold_batch_norm,
        max_tokens=data.max_tokens,
    )
    vision = (
        pretrained_tower(model.vision, vision_config, "model.vision") if model.vision.pretrained else None
    )
    text = pretrained_tower(model.text, text_config, "model.text") if model.text.pretrained else None
    return DualEncoder(config, vision, text), load_tokenizer(model.text, "model.text")
