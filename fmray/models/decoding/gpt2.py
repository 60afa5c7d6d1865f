"""GPT-2: learned positions, LayerNorm before each part, biases everywhere, tied head."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fmray.models.decoding.causal import Attention, CausalDecoder
from fmray.models.decoding.weights import (
    Matrix,
    Precision,
    activation,
    effective_bias,
    effective_weight,
)


class Norm:
    """A LayerNorm with its weights as they are now."""

    def __init__(self, norm: Any) -> None:
        self._shape, self._epsilon = norm.normalized_shape, norm.eps
        self._weight, self._bias = effective_weight(norm).clone(), effective_bias(norm)

    def __call__(self, x_MD: Tensor) -> Tensor:
        return F.layer_norm(x_MD, self._shape, self._weight, self._bias, self._epsilon)


class _Layer:
    def __init__(self, block: Any, precision: Precision) -> None:
        attention = block.attn
        self.norm_1, self.norm_2 = Norm(block.ln_1), Norm(block.ln_2)
        self.qkv = Matrix([attention.c_attn], precision, scaled=(attention.embed_dim, attention.scaling))
        self.out = Matrix([attention.c_proj], precision)
        self.up, self.down = Matrix([block.mlp.c_fc], precision), Matrix([block.mlp.c_proj], precision)
        self.act = activation(block.mlp.act)


class Gpt2Decoder(CausalDecoder):
    """`transformers.GPT2LMHeadModel`, one step at a time."""

    def refresh(self) -> None:
        model, config = self._model, self._model.config
        self.heads, self.groups, self.width = config.n_head, 1, config.n_embd // config.n_head
        self._blocks = []  # the old copies go before the new ones come
        self._blocks = [_Layer(block, self.precision) for block in model.transformer.h]
        self.layers = len(self._blocks)
        self._words = effective_weight(model.transformer.wte)
        self._places = effective_weight(model.transformer.wpe)
        self._norm = Norm(model.transformer.ln_f)
        self.head = Matrix([model.lm_head], self.precision, replaced=self.replaced)

    def positions(self) -> int | None:
        return len(self._places)

    def embed(self, ids_BP: Tensor, positions_BP: Tensor, words_BPD: Tensor | None = None) -> Tensor:
        words_BPD = F.embedding(ids_BP, self._words) if words_BPD is None else words_BPD.float()
        return words_BPD + F.embedding(positions_BP, self._places)

    def trunk(self, x_MD: Tensor, attention: Attention) -> Tensor:
        for index, layer in enumerate(self._blocks):
            x_MD += layer.out(attention(index, layer.qkv(layer.norm_1(x_MD))))
            x_MD += layer.down(layer.act(layer.up(layer.norm_2(x_MD))))
        return x_MD

    def logits(self, x_BD: Tensor) -> Tensor:
        return self.head(self._norm(x_BD)).float()
