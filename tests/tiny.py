"""Tiny real models and batches that several tests use; no download needed."""

from __future__ import annotations

import torch
from transformers import BertConfig, ViTConfig

from fmray.config.schema import ImageConfig
from fmray.models.clip import DualEncoder, DualEncoderConfig
from fmray.types import ImageTextBatch


def tiny_config(*, dropout: float = 0.0, objective: str = "infonce", width: int = 16) -> DualEncoderConfig:
    shape = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
    }
    noise = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return DualEncoderConfig(
        vision_config=ViTConfig(image_size=16, patch_size=8, **shape, **noise),
        text_config=BertConfig(vocab_size=50, max_position_embeddings=16, **shape, **noise),
        image=ImageConfig(size=16, normalize="half").model_dump(mode="json"),
        embed_dim=8,
        vision_pooling="cls",
        text_pooling="mean",
        objective=objective,
        initial_temperature=0.2,
        dropout=dropout,
        max_tokens=12,
    )


def tiny_model(seed: int = 0, **options: object) -> DualEncoder:
    torch.manual_seed(seed)
    return DualEncoder(tiny_config(**options))  # type: ignore[arg-type]


def tiny_batch(rows: int, seed: int = 0) -> ImageTextBatch:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (rows, 1), generator=draw)
    mask = (torch.arange(8) < lengths).long()
    return ImageTextBatch(
        pixels_BCHW=torch.randint(0, 256, (rows, 3, 16, 16), generator=draw, dtype=torch.uint8),
        token_ids_BT=torch.randint(1, 50, (rows, 8), generator=draw) * mask,
        mask_BT=mask,
        caption_key_B=torch.arange(rows),
    )
