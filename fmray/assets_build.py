"""Converters from a package's members to what fmray reads; imported only when an asset is built."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MobileNetV2Config, MobileNetV2Model

from fmray.errors import AssetError


def build_mobilenet_v2(raw: Path, done: Path) -> None:
    """torchvision's `mobilenet_v2-b0353104.pth` as a folder for `MobileNetV2Model.from_pretrained`."""
    state = torch.load(raw / "mobilenet_v2-b0353104.pth", map_location="cpu", weights_only=True)
    # torchvision's arithmetic: symmetric padding, eps 1e-5 (transformers' defaults are TensorFlow's)
    config = MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, architectures=["MobileNetV2Model"])
    model = MobileNetV2Model(config)
    missing, unexpected = model.load_state_dict(mobilenet_v2_names(state), strict=False)
    if missing or unexpected:
        raise AssetError(
            f"asset 'mobilenet_v2': weights do not fit: missing {missing}, unexpected {unexpected}"
        )
    config.save_pretrained(done)
    save_file(model.state_dict(), done / "model.safetensors", metadata={"format": "pt"})


def mobilenet_v2_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names as transformers'; the classifier is left out.

    `features.3.conv.1.0.weight` becomes `layer.1.conv_3x3.convolution.weight`.
    """
    return {_rename(name): value for name, value in state.items() if not name.startswith("classifier.")}


def _rename(name: str) -> str:
    """A block is expand (conv.0), depthwise (conv.1), reduce (conv.2, norm conv.3); block 1 has no expand."""
    match = re.fullmatch(r"features\.(\d+)\.(?:conv\.)?(\d)\.(?:(\d)\.)?(\w+)", name)
    if match is None:
        raise AssetError(f"asset 'mobilenet_v2': unknown tensor {name} in torchvision's file")
    block, part, inner, leaf = int(match[1]), int(match[2]), match[3], match[4]
    kinds = ("convolution", "normalization")
    if block in (0, 18):
        return f"{'conv_stem.first_conv' if block == 0 else 'conv_1x1'}.{kinds[part]}.{leaf}"
    owner = "conv_stem" if block == 1 else f"layer.{block - 2}"
    convs = ("conv_3x3", "reduce_1x1") if block == 1 else ("expand_1x1", "conv_3x3", "reduce_1x1")
    if inner is not None:
        return f"{owner}.{convs[part]}.{kinds[int(inner)]}.{leaf}"
    return f"{owner}.reduce_1x1.{kinds[part - (len(convs) - 1)]}.{leaf}"


def build_groceries(raw: Path, done: Path) -> None:
    """One parquet per split, in row groups of 64 photos so that one photo is read without the other thousand.

    Columns: image (JPEG bytes), caption (one of 14 kinds: 'Golden Delicious'), fruit (one of 5: 'Apple').
    """
    columns = ["dataset", "image_data", "finegrained_cat", "coarse_cat"]
    table = pq.read_table(raw / "images2.parquet", columns=columns)
    for split in ("train", "val", "test"):
        rows = table.filter(pc.equal(table["dataset"], split))
        kinds = pc.replace_substring(rows["finegrained_cat"], "-", " ")
        photos = pa.table({"image": rows["image_data"], "caption": kinds, "fruit": rows["coarse_cat"]})
        pq.write_table(photos, done / f"{split}.parquet", row_group_size=64, compression="none")


BUILDERS: dict[str, Callable[[Path, Path], None]] = {
    "mobilenet_v2/1": build_mobilenet_v2,
    "groceries/1": build_groceries,
}
"""By the `build` of `assets.json`; a change of what is written takes a new number."""
