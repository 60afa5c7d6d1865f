"""Language models that act and judge: any transformers encoder-decoder or causal LM, asked for the states of its answers.

B rows  P prompt tokens  T response tokens  N real response tokens  D width  V vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Language:
    """A model in fp32 without dropout, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)


def open_language_model(source: str, key: str) -> Language:
    """An `asset:`, a hub id, a model, checkpoint or run folder; raises ConfigError where it cannot be one.

    The model is checked: its logits must be its output matrix times its last state, which is what `response_logits` relies on.
    """
    location = locate_model(source, key)
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
    shared_prompts: bool = False,
) -> Tensor:
    """The last hidden state from which each response token is predicted, [B, T, D].

    Row t is the state before token t. Padding is told by the masks alone. With `shared_prompts` an encoder runs once for equal
    prompts.
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
    body = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    before = prompt_ids_BP.shape[1] - 1
    states = body.last_hidden_state[:, before:-1]
    return states


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
    logits: Tensor = model.get_output_embeddings()(states_ND)
    return logits


def _check_logits(model: PreTrainedModel, key: str, source: str) -> None:
    """Refuse architectures that do more to a state than multiply it by the output matrix (soft caps, scales)."""
    ids = torch.arange(2, 8).view(1, 6) % model.config.vocab_size
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
