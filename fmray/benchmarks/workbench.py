"""What both sides work on, written into one folder: the same towers with the same weights, the same pictures and captions.

folder/
    vocabulary.json         the peer's tokenizer
    checkpoint/             transformers' CLIPModel: what fmray loads
    open_clip.safetensors   the same weights under open_clip's names
    batch.safetensors       pixels (uint8, and normalised float32), token ids padded to the context, mask
    pictures/               *.jpg, train.jsonl and test.jsonl (fmray), train.csv (open_clip)
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fmray.config.schema import (
    AugmentConfig,
    DataConfig,
    EmojiSource,
    EvaluateConfig,
    ImageConfig,
    JsonlSource,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    ReportConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
)
from fmray.data.sources import open_source
from fmray.models.preparation import IMAGE_STATISTICS
from fmray.models.saved import from_transformers, save_preparation
from fmray.types import ImageText

CONTEXT = 77
"""Tokens of CLIP's context: what open_clip pads every caption to."""
START, END = 49406, 49407
"""CLIP's special tokens; END is the highest id, which open_clip pools by."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How big everything is, and how often it is measured."""

    side: int = 96
    patch: int = 16
    width: int = 192
    vision_layers: int = 4
    text_layers: int = 3
    head_width: int = 64
    batch: int = 64
    pictures: int = 512
    picture_side: int = 256
    emoji: bool = True
    """Draw from the emoji pictures; False: made-up pictures, no asset needed."""
    threads: int = 2
    steps: int = 2
    repeats: int = 5
    epochs: int = 2
    file_repeats: int = 2
    peer_workers: int = 2
    cached_rows: int = 128
    memory_rows: int = 256
    chunks: tuple[int, ...] = (64, 16)
    chunk_repeats: int = 3
    ray_batch: int = 32
    ray_steps: int = 150
    ray_repeats: int = 3


FULL = Sizes()
QUICK = Sizes(
    side=32, width=64, vision_layers=1, text_layers=1, batch=8, pictures=32, picture_side=64, emoji=False, threads=1,
    steps=1, repeats=1, file_repeats=1, cached_rows=16, memory_rows=16, chunks=(8, 4),
    chunk_repeats=1, ray_batch=8, ray_steps=4, ray_repeats=1,
)  # fmt: skip


def optimizer_config() -> OptimizerConfig:
    """open_clip_train's defaults for a ViT."""
    return OptimizerConfig(
        lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, schedule="constant", gradient_clipping=1.0
    )


def pretrain_config(folder: Path, sizes: Sizes) -> PretrainConfig:
    """fmray's run on the workbench."""
    return PretrainConfig(
        run=RunConfig(name="benchmark", storage=str(folder / "runs")),
        runtime=RuntimeConfig(threads=sizes.threads, device="cpu"),
        report=ReportConfig(progress=False),
        data=DataConfig(
            source=JsonlSource(path=str(folder / "pictures")),
            batch_size=sizes.batch,
            max_tokens=CONTEXT,
            # what RandomResizedCrop(0.9, 1.0) of the peer's transform amounts to: a little larger, a little aside
            augment=AugmentConfig(translate=0.05, scale=0.1),
        ),
        model=ModelConfig(checkpoint=str(folder / "checkpoint")),
        optimizer=optimizer_config(),
        objective=ObjectiveConfig(positives="pair"),
        train=TrainConfig(steps=sizes.ray_steps),
        evaluate=EvaluateConfig(max_samples=8),
    )


def peer_preparation(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Arguments of the peer's `prepare`."""
    heads = sizes.width // sizes.head_width
    vision = {
        "image_size": sizes.side,
        "patch_size": sizes.patch,
        "width": sizes.width,
        "head_width": sizes.head_width,
    }
    text = {"context_length": CONTEXT, "vocab_size": END + 1, "width": sizes.width, "heads": heads}
    optimizer = optimizer_config()
    return {
        "folder": str(folder),
        "model": {
            "embed_dim": sizes.width,
            "vision_cfg": vision | {"layers": sizes.vision_layers},
            "text_cfg": text | {"layers": sizes.text_layers},
        },
        "optimizer": {
            "lr": optimizer.lr,
            "betas": optimizer.betas,
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            "clip": optimizer.gradient_clipping,
        },
        "batch_size": sizes.batch,
        "threads": sizes.threads,
    }


def write_workbench(folder: Path, sizes: Sizes) -> None:
    """Everything but vocabulary.json, which the peer has written."""
    tokenizer = clip_tokenizer(folder / "vocabulary.json")
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**clip_keys(sizes)))
    image = ImageConfig(size=sizes.side, normalize="clip")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(checkpoint)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    save_preparation(from_transformers(model, image), tokenizer, checkpoint)
    save_file(open_clip_weights(model.state_dict()), folder / "open_clip.safetensors")
    captions = write_pictures(folder / "pictures", sizes)
    save_file(fixed_batch(captions[: sizes.batch], tokenizer, sizes), folder / "batch.safetensors")
    (folder / "sizes.json").write_text(json.dumps(asdict(sizes)), encoding="utf-8")


def clip_keys(sizes: Sizes) -> dict[str, Any]:
    """transformers' keys for open_clip's architecture (exact GELU; CLIP's own checkpoints use an approximation)."""
    shared = {
        "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width,
        "num_attention_heads": sizes.width // sizes.head_width,
        "hidden_act": "gelu",
        "projection_dim": sizes.width,
    }
    special = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    text = {"vocab_size": END + 1, "max_position_embeddings": CONTEXT, "num_hidden_layers": sizes.text_layers}
    vision = {"image_size": sizes.side, "patch_size": sizes.patch, "num_hidden_layers": sizes.vision_layers}
    return {
        "text_config": shared | text | special,
        "vision_config": shared | vision,
        "projection_dim": sizes.width,
    }


def clip_tokenizer(vocabulary: Path) -> CLIPTokenizer:
    """The peer's vocabulary as a Hugging Face tokenizer: the same ids."""
    words = json.loads(vocabulary.read_text(encoding="utf-8"))
    names = {START: "<|startoftext|>", END: "<|endoftext|>"}
    ids = {names.get(number, word): number for word, number in words["ids"].items()}
    tokenizer = CLIPTokenizer(vocab=ids, merges=[tuple(pair) for pair in words["merges"]])
    tokenizer.model_max_length = CONTEXT
    return tokenizer


# ---------------------------------------------------------------------------------------------------------- weights


def open_clip_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel's weights under open_clip's names: packed query, key and value; projections transposed."""
    renamed = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        renamed[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        renamed[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        renamed[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
    for tower, prefix in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        layers = {int(name.split(".")[3]) for name in state if name.startswith(f"{tower}.encoder.layers.")}
        for layer in layers:
            block = _block(state, f"{tower}.encoder.layers.{layer}")
            renamed |= {f"{prefix}.resblocks.{layer}.{name}": value for name, value in block.items()}
    return {name: value.contiguous().clone() for name, value in renamed.items()}


def _block(state: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    pairs = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    pairs |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    block: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        block |= {f"{theirs}.{kind}": state[f"{layer}.{name}.{kind}"] for theirs, name in pairs.items()}
        packed = [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        block[f"attn.in_proj_{kind}"] = torch.cat(packed)
    return block


# ----------------------------------------------------------------------------------------------------- pictures, batch


def write_pictures(folder: Path, sizes: Sizes) -> list[str]:
    """Picture files with one caption each, listed for both sides; the captions."""
    folder.mkdir()
    names, captions = [], []
    source = open_source(EmojiSource(), "train") if sizes.emoji else None
    for index in range(sizes.pictures):
        picture, caption = (
            _made_up(index, sizes) if source is None else _emoji(source[index % len(source)], sizes)
        )
        names.append(f"{index:05d}.jpg")
        captions.append(caption)
        picture.save(folder / names[-1], quality=90)
    lines = [json.dumps({"image": n, "caption": c}) + "\n" for n, c in zip(names, captions, strict=True)]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    rows = [f"{folder / n}\t{c}\n" for n, c in zip(names, captions, strict=True)]
    (folder / "train.csv").write_text("filepath\ttitle\n" + "".join(rows), encoding="utf-8")
    return captions


def _emoji(sample: ImageText, sizes: Sizes) -> tuple[Image.Image, str]:
    drawn = Image.open(io.BytesIO(sample.image)).convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    size = (sizes.picture_side, sizes.picture_side)
    picture = Image.alpha_composite(white, drawn).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return picture, f"a picture of {sample.captions[0]}"


def _made_up(index: int, sizes: Sizes) -> tuple[Image.Image, str]:
    blocks = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    size = (sizes.picture_side, sizes.picture_side)
    return Image.fromarray(blocks).resize(
        size, Image.Resampling.BICUBIC
    ), f"a picture of thing number {index}"


def fixed_batch(captions: list[str], tokenizer: CLIPTokenizer, sizes: Sizes) -> dict[str, Tensor]:
    """One batch as both sides take it: token ids in CLIP's layout, [B, 77], zeros behind the end of the text."""
    draw = torch.Generator().manual_seed(0)
    pixels_BCHW = torch.randint(
        0, 256, (sizes.batch, 3, sizes.side, sizes.side), generator=draw, dtype=torch.uint8
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGE_STATISTICS["clip"])
    rows = tokenizer(captions, truncation=True, max_length=CONTEXT)["input_ids"]
    lengths = torch.tensor([[len(row)] for row in rows])
    return {
        "pixels": pixels_BCHW,
        "normalized": ((pixels_BCHW.float() / 255 - mean) / std).contiguous(),
        "token_ids": torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows]),
        "mask": (torch.arange(CONTEXT) < lengths).long(),
    }
