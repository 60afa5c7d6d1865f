"""A small real data set and text tower on disk, so that whole runs need no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, PreTrainedTokenizerFast

from tests.keys import with_keys

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 210, 40),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "bar")


def draw(color: str, shape: str, seed: int) -> Image.Image:
    """A 16×16 picture of one shape, a little moved."""
    random = np.random.default_rng(seed)
    x, y = random.integers(1, 5, 2)
    picture = Image.new("RGB", (16, 16), (255, 255, 255))
    pen, box = ImageDraw.Draw(picture), [int(x), int(y), int(x) + 9, int(y) + 9]
    if shape == "circle":
        pen.ellipse(box, fill=COLORS[color])
    elif shape == "square":
        pen.rectangle(box, fill=COLORS[color])
    elif shape == "triangle":
        pen.polygon(
            [(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=COLORS[color]
        )
    else:
        pen.rectangle([box[0], box[1] + 3, box[2], box[1] + 6], fill=COLORS[color])
    return picture


def write_shapes(folder: Path, per_kind: int = 3) -> Path:
    """train/ and test/ with a folder per caption: 20 captions."""
    for number, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
        for split, count in (("train", per_kind), ("test", 1)):
            kind = folder / split / f"{color}_{shape}"
            kind.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                draw(color, shape, 100 * number + index + (50 if split == "test" else 0)).save(
                    kind / f"{index}.png"
                )
    return folder


def write_text_tower(folder: Path) -> Path:
    """config.json and a word tokenizer: what `model.text.source` takes with `pretrained=false`."""
    words = ["[PAD]", "[UNK]", "a", "photo", "of", *COLORS, *SHAPES]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    ).save_pretrained(folder)
    return folder


def shapes_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """A whole pretraining configuration over the shapes, as nested keys; `changes` are dotted keys with `__`."""
    if not (folder / "shapes").exists():
        write_shapes(folder / "shapes")
        write_text_tower(folder / "text")
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config: dict[str, Any] = {
        "run": {"name": "shapes", "storage": str(folder / "runs")},
        "runtime": {"threads": 1},
        "report": {"progress": False},
        "data": {
            "source": {"kind": "folder", "path": str(folder / "shapes")},
            "batch_size": 12,
            "max_tokens": 12,
        },
        "model": {
            "vision": {
                "source": "arch:vit",
                "pretrained": False,
                "overrides": {**tiny, "image_size": 16, "patch_size": 8},
            },
            "text": {"source": str(folder / "text"), "pretrained": False},
            "image": {"size": 16, "normalize": "half"},
            "embed_dim": 16,
            "tower_dropout": 0.0,
        },
        "optimizer": {"lr": 3e-3},
        "train": {"steps": 20},
        "evaluate": {"batch_size": 8},
    }
    return with_keys(config, changes, "__")


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """The configuration as a file for `--config`."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(shapes_run(folder, run__name=name, **changes)), encoding="utf-8")
    return path
