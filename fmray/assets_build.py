"""Converters from a package's members to what fmray reads; imported only when an asset is built."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor
from transformers import MobileNetV2Config, MobileNetV2Model, PreTrainedTokenizerFast

from fmray.assets_language import (
    build_flan_t5_small,
    build_gpt2_tokenizer,
    build_grammar_tagger,
    build_movie_reviews,
    build_smollm2_135m,
)
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
        first = {image.as_py(): number for number, image in reversed(list(enumerate(rows["image_data"])))}
        rows = rows.take(sorted(first.values()))  # the package holds every test photo twice
        kinds = pc.replace_substring(rows["finegrained_cat"], "-", " ")
        photos = pa.table({"image": rows["image_data"], "caption": kinds, "fruit": rows["coarse_cat"]})
        pq.write_table(photos, done / f"{split}.parquet", row_group_size=64, compression="none")


def build_multilingual_sentences(raw: Path, done: Path) -> None:
    """universal-sentence-encoder-multilingual 3: weights, config.json and a fast tokenizer for the auto classes."""
    with np.load(raw / "weights.npz", allow_pickle=False) as archive:
        weights = {name: torch.from_numpy(archive[name]) for name in archive.files if archive[name].ndim}
    config = {
        "architectures": ["SentenceEncoder"],
        "model_type": "fmray_sentence_encoder",  # fmray.models.sentence_encoder; the rest are its defaults
        "pad_token_id": 128_000,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (done / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: value.contiguous() for name, value in sentence_encoder_names(weights).items()}
    save_file(state, done / "model.safetensors", metadata={"format": "pt"})
    sentencepiece_tokenizer((raw / "sp.model").read_bytes()).save_pretrained(done)


def sentence_encoder_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's arrays under the names and in the layouts of `SentenceEncoder`.

    The embedding lies in `q1` … `q17`, uint8 [7530, 512]: row r of chunk c is token 17r + c, its value lo[c] + scale[c]·q.
    Matrices are [in, out]; those of the convolutions [window · in, out].
    """
    lows, scales = weights["lo"], weights["scale"]
    chunks = [weights[f"q{c + 1}"].float() * scales[c] + lows[c] for c in range(len(lows))]
    named = {
        "embed_tokens.weight": torch.stack(chunks, dim=1).flatten(0, 1),
        "token_norm.weight": weights["ln_g"],
        "token_norm.bias": weights["ln_b"],
        "token_projection.weight": weights["cnn_W"].T,
        "token_projection.bias": weights["cnn_b"],
    }
    orders = (2, 3, 5)
    # the three branches are projected and normalised side by side, as one vector
    named["branch_projection.weight"] = torch.cat([weights[f"proj{n}"] for n in orders], dim=1).T
    for target, source in {"projection.bias": "proj_b", "norm.weight": "ln_g", "norm.bias": "ln_b"}.items():
        named[f"branch_{target}"] = torch.cat([weights[f"{source}{n}"] for n in orders])
    for n in orders:
        for layer, number in (("first", 1), ("second", 2)):
            matrix = weights[f"w{number}_{n}"]
            named[f"branches.{n}.{layer}.weight"] = matrix.view(n, -1, matrix.shape[1]).permute(2, 1, 0)
            named[f"branches.{n}.{layer}.bias"] = weights[f"b{number}_{n}"]
    dense = {"narrow": ("p1", "d0", "d1"), "widen": ("p3", "d2", "d3")}
    for block, sources in dense.items():
        for layer, source in zip(("shortcut", "first", "second"), sources, strict=True):
            named[f"{block}.{layer}.weight"] = weights[source].T
    return named


def sentencepiece_tokenizer(model: bytes) -> PreTrainedTokenizerFast:
    """A SentencePiece unigram model (`sp.model`) as a fast tokenizer: the same ids, `<s>` and `</s>` around them.

    The padding token follows the last piece. Read from sentencepiece_model.proto: ModelProto.pieces = 1,
    .normalizer_spec = 3; SentencePiece.piece = 1, .score = 2; NormalizerSpec.precompiled_charsmap = 2.
    """
    pieces: list[tuple[str, float]] = []
    normaliser = b""
    for field, value in _protobuf_fields(model):
        if field == 1:
            row = dict(_protobuf_fields(value))
            pieces.append((row[1].decode("utf-8"), struct.unpack("<f", row[2])[0]))
        elif field == 3:
            normaliser = dict(_protobuf_fields(value))[2]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(normaliser),
            normalizers.NFC(),  # Precompiled goes by character, SentencePiece by longest match: it also composes
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex("^ +| +$"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each field of a protobuf message (of a varint, none: no caller reads one)."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        if key & 7 == 0:
            size = _varint(message, position)[1] - position
        elif key & 7 == 2:
            size, position = _varint(message, position)
        elif key & 7 in (1, 5):
            size = 8 if key & 7 == 1 else 4
        else:
            raise AssetError(f"asset 'multilingual_sentences': sp.model is no protobuf (wire type {key & 7})")
        yield key >> 3, b"" if key & 7 == 0 else message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A base-128 number, least significant group first, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


BUILDERS: dict[str, Callable[[Path, Path], None]] = {
    "mobilenet_v2/1": build_mobilenet_v2,
    "groceries/2": build_groceries,
    "multilingual_sentences/1": build_multilingual_sentences,
    "flan_t5_small/1": build_flan_t5_small,
    "movie_reviews/1": build_movie_reviews,
    "grammar_tagger/1": build_grammar_tagger,
    "smollm2_135m/1": build_smollm2_135m,
    "gpt2_tokenizer/1": build_gpt2_tokenizer,
}
"""By the `build` of `assets.json`; a change of what is written takes a new number."""
