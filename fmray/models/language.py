"""Language models that act and judge: any transformers encoder-decoder or causal LM, or our multimodal LLM, asked for the
states of its answers.

B rows  P prompt tokens  T response tokens  N real response tokens, or distinct prompts  D width  V vocabulary  C,H,W pixels
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fmray.config.rlhf import LoraConfig
from fmray.errors import ConfigError, require_package
from fmray.models.towers import locate_model

if TYPE_CHECKING:
    from fmray.models.mllm_answering import MllmAnswering

MLLM = "fmray_mllm"
"""`model_type` of our multimodal LLM."""


@dataclass(frozen=True, slots=True)
class Language:
    """A model in fp32 without dropout, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    answering: MllmAnswering | None = None
    """How a multimodal LLM reads dialogues; None for a model of text alone."""

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id) if self.answering is None else self.answering.renderer.end_id

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """A folder that `open_language_model` reads; `weights` are whole, and adapters among them are added in."""
        if self.answering is not None:
            self.answering.save(weights, folder)
        else:
            save_language_model(self.model, merged_weights(self.model, weights), self.tokenizer, folder)


def open_language_model(source: str, key: str) -> Language:
    """An `asset:`, a hub id, a model, checkpoint or run folder, a multimodal LLM's too; raises ConfigError where it is none.

    The model is checked: its logits must be its output matrix times its last state, which is what `response_logits` relies on.
    """
    location = locate_model(source, key)
    if _kind(location) == MLLM:
        return _open_mllm(location, key, source)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(
            location, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(key, source, f"cannot be loaded as a language model: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(key, source, "its tokenizer has no end-of-sequence token, so an answer never ends")
    without_dropout(model)
    _check_logits(model, key, source)
    return Language(model, tokenizer)


def _kind(location: str) -> str | None:
    """What a local folder's config.json calls its model."""
    config = Path(location, "config.json")
    if not config.is_file():
        return None
    kind: str | None = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    return kind


def _open_mllm(folder: str, key: str, source: str) -> Language:
    from fmray.models.mllm_answering import load_mllm  # it needs this module's adapters

    answering = load_mllm(folder, torch.device("cpu"))
    if answering.model.cross_attention is not None:
        cure = "its pictures do not stand in the sequence (fusion=cross_attention), which PPO needs; take one of fusion=concat"
        raise ConfigError(key, source, cure)
    without_dropout(answering.model)
    _check_logits(answering.model, key, source)
    return Language(answering.model, answering.tokenizer, answering)


def speaker(model: PreTrainedModel) -> PreTrainedModel:
    """What says the words: of a multimodal LLM its language model, else the model itself."""
    found: PreTrainedModel = model.language if model.config.model_type == MLLM else model
    return found


def words_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of what says the words, with its `hidden_size` and `vocab_size`."""
    config: PreTrainedConfig = speaker(model).config
    return config


def lock_eyes(model: PreTrainedModel) -> None:
    """A multimodal LLM's picture tower does not learn; nothing happens to a model of text."""
    if model.config.model_type == MLLM:
        model.vision.requires_grad_(False)


def without_dropout(model: nn.Module) -> None:
    """Dropout off for good, in training mode too: the policy that is scored is the one that was sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):  # given to the attention function as a number
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.eval()


def response_states(
    model: PreTrainedModel,
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    response_ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    pixels_BCHW: Tensor | None = None,
    shared_prompts: bool = False,
) -> Tensor:
    """The last hidden state from which each response token is predicted, [B, T, D].

    Row t is the state before token t. Padding is told by the masks alone. With `shared_prompts` an encoder runs once for equal
    prompts. pixels_BCHW: uint8, each row's picture, whose placeholders are among its prompt's tokens; the picture tower runs
    once for equal pictures. Raises ConfigError where a model of text is given pictures, DataError where a multimodal LLM
    misses them.
    """
    if model.config.is_encoder_decoder:
        start = torch.full_like(response_ids_BT[:, :1], model.config.decoder_start_token_id)
        decoder_ids = torch.cat([start, response_ids_BT[:, :-1]], dim=1)
        prompt_of_B = None
        encoder_ids, encoder_mask = prompt_ids_BP, prompt_mask_BP
        if shared_prompts:
            both = torch.stack([prompt_ids_BP, prompt_mask_BP], dim=1)
            both, prompt_of_B = torch.unique(both, dim=0, return_inverse=True)
            encoder_ids, encoder_mask = both[:, 0], both[:, 1]
        encoder_words, decoder_words = _embedded(model, encoder_ids, decoder_ids)
        encoded = model.get_encoder()(**encoder_words, attention_mask=encoder_mask).last_hidden_state
        if prompt_of_B is not None:
            encoded = encoded[prompt_of_B]
        # responses are padded to the right and the decoder looks to the left: it needs no mask of its own, and one by
        # `ids != pad` would hide the start token, which T5 shares with padding
        decoded = model.get_decoder()(
            **decoder_words,
            encoder_hidden_states=encoded,
            encoder_attention_mask=prompt_mask_BP,
            use_cache=False,
        )
        states: Tensor = decoded.last_hidden_state
        return states
    ids = torch.cat([prompt_ids_BP, response_ids_BT], dim=1)
    mask = torch.cat([prompt_mask_BP, mask_BT.to(prompt_mask_BP.dtype)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    words_BLD = embedded_prompts(model, ids, pixels_BCHW)
    read = {"input_ids": ids} if words_BLD is None else {"inputs_embeds": words_BLD}
    body = speaker(model).base_model(**read, attention_mask=mask, position_ids=positions, use_cache=False)
    before = prompt_ids_BP.shape[1] - 1
    states = body.last_hidden_state[:, before:-1]
    return states


def embedded_prompts(model: PreTrainedModel, ids_BP: Tensor, pixels_BCHW: Tensor | None) -> Tensor | None:
    """Embeddings of words with each row's picture put in, [B, P, D]; None for a model of text, which reads the ids.

    Raises ConfigError where that is given pictures, DataError where a multimodal LLM misses them.
    """
    if model.config.model_type != MLLM:
        if pixels_BCHW is not None:
            cure = "sees no pictures, but the policy does: policy, separate critic and reference are multimodal LLMs alike"
            raise ConfigError("policy.source", model.config.model_type, cure)
        return None
    projected_BPD: Tensor | None = None
    if pixels_BCHW is not None:
        pixels_NX, row_B = torch.unique(pixels_BCHW.flatten(1), dim=0, return_inverse=True)
        projected_BPD = model.projected(pixels_NX.unflatten(1, pixels_BCHW.shape[1:]))[row_B]
    words_BPD: Tensor = model.prompt_words(ids_BP, projected_BPD)
    return words_BPD


def _embedded(
    model: PreTrainedModel, encoder_ids: Tensor, decoder_ids: Tensor
) -> tuple[dict[str, Tensor], ...]:
    """What encoder and decoder are given: where they share one plain table, one look-up for both.

    The gradient of a look-up is as large as the table: two of them would be made and added at every step.
    """
    table = model.get_input_embeddings()
    theirs = [stack.get_input_embeddings() for stack in (model.get_encoder(), model.get_decoder())]
    if not all(type(own) is nn.Embedding and own.weight is table.weight for own in theirs):
        return {"input_ids": encoder_ids}, {"input_ids": decoder_ids}
    both = table(torch.cat([encoder_ids.reshape(-1), decoder_ids.reshape(-1)]))
    encoder, decoder = both.split([encoder_ids.numel(), decoder_ids.numel()])
    return (
        {"inputs_embeds": encoder.view(*encoder_ids.shape, -1)},
        {"inputs_embeds": decoder.view(*decoder_ids.shape, -1)},
    )


def response_logits(model: PreTrainedModel, states_ND: Tensor) -> Tensor:
    """The vocabulary's logits of some states, [N, V] in the precision of the output matrix's product."""
    if getattr(model.config, "scale_decoder_outputs", False):
        states_ND = states_ND * model.config.d_model**-0.5
    said: Any = model.said_next if model.config.model_type == MLLM else model.get_output_embeddings()
    logits: Tensor = said(states_ND)
    return logits


def _check_logits(model: PreTrainedModel, key: str, source: str) -> None:
    """Refuse architectures that do more to a state than multiply it by the output matrix (soft caps, scales)."""
    ids = torch.arange(2, 8).view(1, 6) % words_config(model).vocab_size
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        states = response_states(model, ids[:, :3], mask[:, :3], ids[:, 3:], mask[:, 3:])
        ours = response_logits(model, states[0])
        if model.config.is_encoder_decoder:
            start = torch.full((1, 1), model.config.decoder_start_token_id)
            decoder_ids = torch.cat([start, ids[:, 3:5]], dim=1)
            theirs = model(input_ids=ids[:, :3], decoder_input_ids=decoder_ids).logits[0]
        else:
            theirs = model(input_ids=ids).logits[0, 2:5]
    if not torch.allclose(ours, theirs.float(), atol=1e-3, rtol=1e-3):
        cure = f"the architecture {model.config.model_type} computes its logits in a way of its own, which PPO here cannot follow"
        raise ConfigError(key, source, cure)


# ---------------------------------------------------------------------------------------------------------------- adapters


def add_adapter(model: PreTrainedModel, lora: LoraConfig, key: str) -> None:
    """Put a LoRA adapter (Hu 2021) into the model, in place; everything else is frozen. Needs peft."""
    require_package("peft", "lora", key)
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.targets) if lora.targets else _usual_targets(model, key),
    )
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(f"{key}.targets", lora.targets, str(error).splitlines()[0]) from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _usual_targets(model: PreTrainedModel, key: str) -> list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    kind = model.config.model_type
    if kind not in USUAL:
        raise ConfigError(f"{key}.targets", None, f"peft knows no usual layers of {kind}: name them")
    return list(USUAL[kind])


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as if it had no adapter."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every adapter added into the matrix it belongs to, under the names of the model without adapters."""
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        stem, is_base, leaf = name.rpartition(".base_layer.")
        if is_base and leaf == "weight":
            layer: Any = model.get_submodule(stem)
            down, up = weights[f"{stem}.lora_A.default.weight"], weights[f"{stem}.lora_B.default.weight"]
            update = (up @ down) * layer.scaling["default"]
            value = value + (update.T if layer.fan_in_fan_out else update)
        merged[f"{stem}.{leaf}" if is_base else name] = value
    return merged


# ----------------------------------------------------------------------------------------------------------------- on disk


def save_language_model(
    model: PreTrainedModel, weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """A folder that `from_pretrained` loads: config.json, model.safetensors (tied weights once), tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    if hasattr(model.config, "scale_decoder_outputs"):
        # T5's own reading of this key is "do not scale the outputs"; it always says True of itself in memory
        config["tie_word_embeddings"] = model.config.scale_decoder_outputs
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    plain = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
