"""The Llama family (Llama, SmolLM2, Qwen2): RMS norms, RoPE, grouped queries, SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.models.decoding.causal import Attention, CausalDecoder
from fmray.models.decoding.weights import Matrix, Precision, activation, effective_weight, rms_normed


class _Layer:
    def __init__(self, block: Any, precision: Precision) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.epsilon_1 = block.input_layernorm.variance_epsilon
        self.epsilon_2 = block.post_attention_layernorm.variance_epsilon
        self.qkv = Matrix(
            [attention.q_proj, attention.k_proj, attention.v_proj],
            precision,
            gain_K=effective_weight(block.input_layernorm),
            scaled=(attention.q_proj.out_features, attention.scaling),  # rotating keeps the scale
        )
        self.out = Matrix([attention.o_proj], precision)
        gain_K = effective_weight(block.post_attention_layernorm)
        self.gate_up = Matrix([mlp.gate_proj, mlp.up_proj], precision, gain_K=gain_K)
        self.down = Matrix([mlp.down_proj], precision)
        self.act = activation(mlp.act_fn)


class LlamaDecoder(CausalDecoder):
    """`transformers.LlamaForCausalLM` and models of its shape, one step at a time."""

    def refresh(self) -> None:
        model, config = self._model, self._model.config
        self.heads = config.num_key_value_heads
        self.groups = config.num_attention_heads // self.heads
        self.width = model.model.layers[0].self_attn.head_dim
        self._blocks = []  # the old copies go before the new ones come
        self._blocks = [_Layer(block, self.precision) for block in model.model.layers]
        self.layers = len(self._blocks)
        self._words = effective_weight(model.model.embed_tokens)
        self._epsilon = model.model.norm.variance_epsilon
        gain_K = effective_weight(model.model.norm)
        self.head = Matrix([model.lm_head], self.precision, gain_K=gain_K, replaced=self.replaced)

    def positions(self) -> int | None:
        return None

    def embed(self, ids_BP: Tensor, positions_BP: Tensor, words_BPD: Tensor | None = None) -> Tensor:
        x_BPD = F.embedding(ids_BP, self._words) if words_BPD is None else words_BPD.float().clone()
        cos_BPW, sin_BPW = self._model.model.rotary_emb(x_BPD, positions_BP)
        half = self.width // 2
        signed_BPW = torch.cat([-sin_BPW[..., :half], sin_BPW[..., half:]], dim=-1)
        self._cos, self._sin = cos_BPW.unsqueeze(2), signed_BPW.unsqueeze(2)
        return x_BPD

    def rotate(self, qk_BPXW: Tensor) -> Tensor:
        """Su et al. 2021, "RoFormer", equation 34, with the pairs (i, i + W/2) that Llama's weights were laid out for."""
        turned = qk_BPXW.roll(self.width // 2, dims=-1) * self._sin.to(qk_BPXW.dtype)
        return turned.addcmul_(qk_BPXW, self._cos.to(qk_BPXW.dtype))

    def trunk(self, x_MD: Tensor, attention: Attention) -> Tensor:
        for index, layer in enumerate(self._blocks):
            x_MD += layer.out(attention(index, layer.qkv(rms_normed(x_MD, layer.epsilon_1))))
            gate_MF, up_MF = layer.gate_up(rms_normed(x_MD, layer.epsilon_2)).chunk(2, dim=-1)
            x_MD += layer.down(layer.act(gate_MF) * up_MF)
        return x_MD

    def logits(self, x_BD: Tensor) -> Tensor:
        return self.head(rms_normed(x_BD, self._epsilon)).float()
