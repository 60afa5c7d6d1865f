"""T5 and FLAN-T5: encoder once per prompt, decoder one token at a time; relative position bias, RMS norms.

N prompts  B samples  R rows still in the batch  M rows · tokens  S source tokens  T answer tokens  H heads  W width of a head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.errors import ConfigError
from fmray.models.decoding.attention import (
    KeyValues,
    aligned,
    attend_all,
    attend_one,
    cache_dtype,
    hiding,
)
from fmray.models.decoding.weights import (
    Matrix,
    Precision,
    activation,
    effective_weight,
    rms_normed,
)


class _SelfAttention:
    def __init__(self, layer: Any, precision: Precision) -> None:
        attention = layer.SelfAttention
        self.epsilon = layer.layer_norm.variance_epsilon
        self.qkv = Matrix(
            [attention.q, attention.k, attention.v], precision, gain_K=effective_weight(layer.layer_norm)
        )
        self.out = Matrix([attention.o], precision)

    def __call__(self, x_MD: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        return x_MD.add_(self.out(attention(self.qkv(rms_normed(x_MD, self.epsilon)))))


class _CrossAttention:
    def __init__(self, layer: Any, precision: Precision, source_gain_K: Tensor) -> None:
        attention = layer.EncDecAttention
        self.epsilon = layer.layer_norm.variance_epsilon
        self.q = Matrix([attention.q], precision, gain_K=effective_weight(layer.layer_norm))
        self.kv = Matrix([attention.k, attention.v], precision, gain_K=source_gain_K)
        self.out = Matrix([attention.o], precision)

    def __call__(self, x_MD: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        return x_MD.add_(self.out(attention(self.q(rms_normed(x_MD, self.epsilon)))))


class _FeedForward:
    def __init__(self, layer: Any, precision: Precision) -> None:
        dense = layer.DenseReluDense
        self.gated = hasattr(dense, "wi_0")
        self.epsilon = layer.layer_norm.variance_epsilon
        inputs = [dense.wi_0, dense.wi_1] if self.gated else [dense.wi]
        self.up = Matrix(inputs, precision, gain_K=effective_weight(layer.layer_norm))
        self.down, self.act = Matrix([dense.wo], precision), activation(dense.act)

    def __call__(self, x_MD: Tensor) -> Tensor:
        up_MF = self.up(rms_normed(x_MD, self.epsilon))
        if self.gated:
            gate_MF, linear_MF = up_MF.chunk(2, dim=-1)
            return x_MD.add_(self.down(self.act(gate_MF) * linear_MF))
        return x_MD.add_(self.down(self.act(up_MF)))


class T5Decoder:
    """`transformers.T5ForConditionalGeneration`, tied or untied head, gated or plain feed-forward."""

    def __init__(self, model: Any, precision: Precision) -> None:
        self._model, self.precision = model, precision
        self.heads, self.width = model.config.num_heads, model.config.d_kv
        self._own, self._source, self._filled = KeyValues([], []), KeyValues([], []), 0
        self._hidden_BS: Tensor | None = None
        self.refresh()

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    def refresh(self) -> None:
        """Copy the module's weights, fused and packed, every norm's gain inside the matrix that reads it."""
        model, precision = self._model, self.precision
        self._encoder, self._decoder = [], []  # the old copies go before the new ones come
        self._encoder = [
            (_SelfAttention(block.layer[0], precision), _FeedForward(block.layer[1], precision))
            for block in model.encoder.block
        ]
        source_gain_K = effective_weight(model.encoder.final_layer_norm)
        self._decoder = [
            (
                _SelfAttention(block.layer[0], precision),
                _CrossAttention(block.layer[1], precision, source_gain_K),
                _FeedForward(block.layer[2], precision),
            )
            for block in model.decoder.block
        ]
        self._source_words = effective_weight(model.encoder.embed_tokens)  # an adapter may part them
        self._words = effective_weight(model.decoder.embed_tokens)
        gain_K = effective_weight(model.decoder.final_layer_norm)
        if model.config.scale_decoder_outputs:  # T5 1.0, whose head is its embedding
            gain_K = gain_K * model.model_dim**-0.5
        self._head = Matrix([model.lm_head], precision, gain_K=gain_K)

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
        self._read(ids_NS, mask_NS, prompt_of_B)
        samples, blocks = len(prompt_of_B), len(self._decoder)
        self._own = KeyValues.empty(
            blocks, (samples, self.heads, max_new_tokens, self.width), self._dtype, self.device
        )
        self._bias_HTT = _position_bias(self._model.decoder, max_new_tokens).to(self._dtype)
        self._filled = 0
        first = ids_NP.new_full((samples,), self._model.config.decoder_start_token_id)
        return self.step(first)

    def step(self, ids_R: Tensor) -> Tensor:
        rows, column = len(ids_R), self._filled
        shape = (rows, self.heads, 1, self.width)
        own_bias = self._bias_HTT[:, column, None, : column + 1].repeat(rows, 1, 1)
        source_bias = None
        if self._hidden_BS is not None:
            source_bias = self._hidden_BS[:, None].repeat_interleave(self.heads, dim=0)
        x_RD = F.embedding(ids_R, self._words)
        for layer, (own, source, feed_forward) in enumerate(self._decoder):

            def to_own(qkv_RX: Tensor, layer: int = layer) -> Tensor:
                keys, values = self._own.keys[layer], self._own.values[layer]
                q, k, v = qkv_RX.to(keys.dtype).view(rows, 3, self.heads, self.width).unbind(1)
                keys[:, :, column], values[:, :, column] = k, v
                return attend_one(
                    q.view(shape), keys[:, :, : column + 1], values[:, :, : column + 1], own_bias
                )

            def to_source(q_RX: Tensor, layer: int = layer) -> Tensor:
                keys, values = self._source.keys[layer], self._source.values[layer]
                return attend_one(q_RX.to(keys.dtype).view(shape), keys, values, source_bias)

            x_RD = feed_forward(source(own(x_RD, to_own), to_source))
        self._filled += 1
        return self._head(rms_normed(x_RD, self._model.decoder.final_layer_norm.variance_epsilon)).float()

    def keep(self, rows_K: Tensor) -> None:
        self._own.keep(rows_K, self._filled)
        self._source.keep(rows_K, self._source.keys[0].shape[2])
        if self._hidden_BS is not None:
            self._hidden_BS = self._hidden_BS[rows_K]

    def _read(self, ids_NS: Tensor, mask_NS: Tensor, prompt_of_B: Tensor) -> None:
        """Encode each prompt once; keys and values of every decoder layer, spread over the samples."""
        prompts, columns = ids_NS.shape
        self._dtype = cache_dtype(self.precision, self.device)
        bias = _position_bias(self._model.encoder, columns).to(self._dtype)
        self._hidden_BS = None
        if not bool(mask_NS.all()):
            hidden = hiding(mask_NS, self._dtype)
            bias = bias + hidden
            self._hidden_BS = hidden[prompt_of_B, 0, 0]

        def attention(qkv_MX: Tensor) -> Tensor:
            heads = qkv_MX.to(self._dtype).view(prompts, columns, 3, self.heads, self.width)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            return attend_all(q, k, v, bias).flatten(0, 1)

        x_MD = F.embedding(ids_NS, self._source_words).flatten(0, 1)
        for own, feed_forward in self._encoder:
            x_MD = feed_forward(own(x_MD, attention))
        x_MD = rms_normed(x_MD, self._model.encoder.final_layer_norm.variance_epsilon)
        keys, values = [], []
        for _, source, _ in self._decoder:
            kv = source.kv(x_MD).to(self._dtype).view(prompts, columns, 2, self.heads, self.width)
            keys.append(kv[:, :, 0].transpose(1, 2).index_select(0, prompt_of_B))
            values.append(kv[:, :, 1].transpose(1, 2).index_select(0, prompt_of_B))
        self._source = KeyValues(keys, values)


def _position_bias(stack: Any, length: int) -> Tensor:
    """What the first layer adds to the scores of all layers, float32 [H, length, length] (query, key)."""
    attention = stack.block[0].layer[0].SelfAttention
    place = torch.arange(length, device=stack.device)
    buckets_TT = attention._relative_position_bucket(
        place[None, :] - place[:, None],
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    table = effective_weight(attention.relative_attention_bias)
    return F.embedding(buckets_TT, table).permute(2, 0, 1).contiguous()
