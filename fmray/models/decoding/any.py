"""Any other transformers model that generates, through its own forward and its own cache. Slower, and right."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fmray.errors import ConfigError
from fmray.models.decoding.attention import aligned, aligned_words
from fmray.models.decoding.weights import Precision


class _ModuleDecoder:
    """What both kinds share: the module is read as it is, so a new version needs no copying."""

    def __init__(self, model: Any, precision: Precision) -> None:
        self._model, self.precision = model, precision
        self._cache: Any = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    def refresh(self) -> None:
        """Nothing is copied: every step reads the module. Adapters act by their own forward."""

    def _precision(self) -> AbstractContextManager[object]:
        self._model.eval()  # no dropout, whatever the owner did since the last answer
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


class AnyCausalDecoder(_ModuleDecoder):
    """A decoder-only model."""

    def start(
        self,
        ids_NP: Tensor,
        mask_NP: Tensor,
        prompt_of_B: Tensor,
        max_new_tokens: int,
        words_NPD: Tensor | None = None,
    ) -> Tensor:
        if words_NPD is not None:
            words_NPD = aligned_words(words_NPD, mask_NP)
        ids_NP, mask_NP = aligned(ids_NP, mask_NP, "left")
        lengths_N = mask_NP.sum(dim=1)
        place_P = torch.arange(ids_NP.shape[1], device=self.device)
        positions_NP = (place_P - (len(place_P) - lengths_N)[:, None]).clamp_min(0)
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._mask_BL, self._positions_B = mask_NP.long(), lengths_N
        logits_NV = self._forward(ids_NP, positions_NP, words_NPD, past_key_values=None)
        self.keep(prompt_of_B)
        return logits_NV[prompt_of_B]

    def step(self, ids_R: Tensor) -> Tensor:
        self._mask_BL = torch.cat([self._mask_BL, self._mask_BL.new_ones((len(ids_R), 1))], dim=1)
        logits_RV = self._forward(ids_R[:, None], self._positions_B[:, None], past_key_values=self._cache)
        self._positions_B = self._positions_B + 1
        return logits_RV

    def keep(self, rows_K: Tensor) -> None:
        self._cache.batch_select_indices(rows_K)
        self._mask_BL, self._positions_B = self._mask_BL[rows_K], self._positions_B[rows_K]

    def _forward(
        self, ids_BP: Tensor, positions_BP: Tensor, words_BPD: Tensor | None = None, **more: Any
    ) -> Tensor:
        read: dict[str, Tensor] = {"input_ids": ids_BP} if words_BPD is None else {"inputs_embeds": words_BPD}
        if self._takes_positions:
            more["position_ids"] = positions_BP
        with self._precision():
            out = self._model(**read, attention_mask=self._mask_BL, use_cache=True, **more)
        self._cache = out.past_key_values
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV.float()


class CrossAttentionDecoder(AnyCausalDecoder):
    """A multimodal LLM whose words look at pictures through gated layers: the pictures stay with their rows."""

    memory: Any = None
    """What the next prompts look at (`gated_attention.Memory`), a row each and a column per token; set it before `start`."""

    def keep(self, rows_K: Tensor) -> None:
        super().keep(rows_K)
        self.memory = None if self.memory is None else self.memory.rows(rows_K)

    def _forward(
        self, ids_BP: Tensor, positions_BP: Tensor, words_BPD: Tensor | None = None, **more: Any
    ) -> Tensor:
        if self.memory is not None:
            more |= {"memory_tokens": self.memory.tokens_RMD, "memory_visible": self.memory.visible_RLM}
        return super()._forward(ids_BP, positions_BP, words_BPD, logits_to_keep=1, **more)


class AnySeq2SeqDecoder(_ModuleDecoder):
    """An encoder-decoder model."""

    def start(
        self,
        ids_NP: Tensor,
        mask_NP: Tensor,
        prompt_of_B: Tensor,
        max_new_tokens: int,
        words_NPD: Tensor | None = None,
    ) -> Tensor:
        if words_NPD is not None:
            raise ConfigError("words_NPD", tuple(words_NPD.shape), "an encoder-decoder reads tokens alone")
        ids_NS, mask_NS = aligned(ids_NP, mask_NP, "right")
        with self._precision():
            encoded = self._model.get_encoder()(input_ids=ids_NS, attention_mask=mask_NS.long())
        self._encoded_BSD = encoded.last_hidden_state[prompt_of_B]
        self._mask_BS, self._cache = mask_NS.long()[prompt_of_B], None
        return self.step(ids_NP.new_full((len(prompt_of_B),), self._model.config.decoder_start_token_id))

    def step(self, ids_R: Tensor) -> Tensor:
        with self._precision():
            out = self._model(
                encoder_outputs=BaseModelOutput(last_hidden_state=self._encoded_BSD),
                attention_mask=self._mask_BS,
                decoder_input_ids=ids_R[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache = out.past_key_values
        logits_RV: Tensor = out.logits[:, -1]
        return logits_RV.float()

    def keep(self, rows_K: Tensor) -> None:
        self._cache.batch_select_indices(rows_K)
        self._encoded_BSD, self._mask_BS = self._encoded_BSD[rows_K], self._mask_BS[rows_K]
