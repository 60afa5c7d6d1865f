"""Any other transformers model that generates, through its own forward and its own cache. Slower, and right."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
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

    whole_cache = False
    """Keep what lies outside of a sliding window too, so that rows can be joined (`ModuleRows`)."""

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
        logits_NV = self._forward(
            ids_NP, positions_NP, words_NPD, past_key_values=DynamicCache() if self.whole_cache else None
        )
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


class ModuleRows:
    """Rows that join and leave (`rows.PromptRows`) by the module's own forward and cache, in decoders of their own.

    They lie left-padded: whoever is shorter than the others gets more padding, and columns without a token are dropped.
    """

    def __init__(self, decoder: AnyCausalDecoder) -> None:
        self._like = decoder
        self._all: AnyCausalDecoder | None = None

    @property
    def count(self) -> int:
        return 0 if self._all is None else len(self._all._positions_B)

    @property
    def bytes(self) -> int:
        layers = [] if self._all is None else self._all._cache.layers
        return sum(
            part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values)
        )

    def join(
        self, ids_KP: Tensor, mask_KP: Tensor, words_KPD: Tensor | None = None, memory: Any = None
    ) -> Tensor:
        """As `rows.PromptRows`; raises ConfigError for a model that keeps other things than keys and values."""
        new = type(self._like)(self._like._model, self._like.precision)
        new.whole_cache = True
        if isinstance(new, CrossAttentionDecoder):
            new.memory = memory
        every_K = torch.arange(len(ids_KP), device=ids_KP.device)
        logits_KV = new.start(ids_KP, mask_KP, every_K, 0, words_KPD)
        odd = next((layer for layer in new._cache.layers if type(layer) is not DynamicLayer), None)
        if odd is not None:
            raise ConfigError("model", type(odd).__name__, "answers cannot join one another in such a cache")
        if self._all is not None:
            _put_before(new, self._all)
        self._all = new
        return logits_KV

    def step(self, ids_R: Tensor) -> Tensor:
        rows = self._all
        assert rows is not None, "no row to step"
        mask_RL, done = rows._mask_BL, False
        try:
            logits_RV = rows.step(ids_R)
            done = True
        finally:
            if not done:  # out of memory between two layers: the same step can be taken again
                rows._mask_BL = mask_RL
                _cut(rows, slice(0, mask_RL.shape[1]))
        return logits_RV

    def keep(self, rows: Sequence[int]) -> None:
        if self._all is None or list(rows) == list(range(self.count)):
            return
        if not rows:
            self._all = None
            return
        self._all.keep(torch.tensor(rows, device=self._all.device))
        _trim(self._all)


def _put_before(new: AnyCausalDecoder, old: AnyCausalDecoder) -> None:
    """The rows of `old`, then those of `new`, in `new`; `old` is left as it was."""
    columns = max(old._mask_BL.shape[1], new._mask_BL.shape[1])
    masks = [F.pad(part._mask_BL, (columns - part._mask_BL.shape[1], 0)) for part in (old, new)]
    layers = []
    for layer_old, layer_new in zip(old._cache.layers, new._cache.layers, strict=True):
        pairs = (layer_old.keys, layer_new.keys), (layer_old.values, layer_new.values)
        layers.append(
            [torch.cat([F.pad(x, (0, 0, columns - x.shape[2], 0)) for x in pair]) for pair in pairs]
        )
    for layer_new, (keys, values) in zip(new._cache.layers, layers, strict=True):
        layer_new.keys, layer_new.values = keys, values
    new._mask_BL = torch.cat(masks)
    if isinstance(old, CrossAttentionDecoder) and isinstance(new, CrossAttentionDecoder):
        new.memory = _memories(old.memory, len(old._positions_B), new.memory, len(new._positions_B))
    new._positions_B = torch.cat([old._positions_B, new._positions_B])


def _memories(old: Any, old_rows: int, new: Any, new_rows: int) -> Any:
    """Both rows' pictures, as far as they have any."""
    like = new if old is None else old
    if like is None:
        return None
    width = like.tokens_RMD.shape[2]
    columns = max(0 if each is None else each.tokens_RMD.shape[1] for each in (old, new))
    tokens, visible = [], []
    for each, rows in ((old, old_rows), (new, new_rows)):
        some = like.tokens_RMD.new_zeros((rows, 0, width)) if each is None else each.tokens_RMD
        seen = like.visible_RLM.new_zeros((rows, 1, 0)) if each is None else each.visible_RLM
        tokens.append(F.pad(some, (0, 0, 0, columns - some.shape[1])))
        visible.append(F.pad(seen, (0, columns - seen.shape[2])))
    return type(like)(torch.cat(tokens), torch.cat(visible))


def _trim(rows: AnyCausalDecoder) -> None:
    """Drop the columns that are padding in every row, and pictures that no row has any more."""
    unused = int(rows._mask_BL.argmax(dim=1).min())
    if unused:
        rows._mask_BL = rows._mask_BL[:, unused:]
        _cut(rows, slice(unused, None))
    if isinstance(rows, CrossAttentionDecoder) and rows.memory is not None:
        memory, seen_M = rows.memory, rows.memory.visible_RLM.any(dim=(0, 1))
        used = int(seen_M.nonzero().max()) + 1 if bool(seen_M.any()) else 0
        some = type(memory)(memory.tokens_RMD[:, :used], memory.visible_RLM[:, :, :used])
        rows.memory = some if used else None


def _cut(rows: AnyCausalDecoder, columns: slice) -> None:
    """Keep these columns of the cache alone, and free the others."""
    for layer in rows._cache.layers:
        layer.keys, layer.values = (x[:, :, columns].contiguous() for x in (layer.keys, layer.values))


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
