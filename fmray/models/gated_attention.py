"""Gated cross-attention between the blocks of a language model that knows nothing of it (Flamingo, Alayrac et al. 2022, §2.2).

R rows  L columns  M picture tokens of a row  K pictures of a row  P tokens of a picture  D width  H heads  W width of a head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fmray.errors import ConfigError

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Architectures that hand the arguments they do not know on to their blocks, as the memory must be."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Pictures that rows of words may look at."""

    tokens_RMD: Tensor
    """[R, M, D], the projected pictures."""
    visible_RLM: Tensor
    """bool [R, L, M], which of them each word sees: those of its own dialogue that stand before it."""

    @staticmethod
    def of_pictures(
        projected_NPD: Tensor,
        pictures_RK: Tensor | None,
        group_RK: Tensor | None,
        place_RK: Tensor | None,
        group_RL: Tensor | None,
        seen_RL: Tensor | None,
        shape: torch.Size,
    ) -> Memory:
        """From `Packed`'s tensors. Without them each row has its own picture, as many rows as pictures, seen by all words."""
        N, P, D = projected_NPD.shape
        R, L = shape[0], shape[1]
        if pictures_RK is None:
            if R != N:
                raise ConfigError(
                    "memory_pictures", None, f"{N} pictures for {R} rows: say which row has which"
                )
            seen = torch.ones((R, L, P), dtype=torch.bool, device=projected_NPD.device)
            return Memory(projected_NPD, seen)
        assert group_RK is not None
        assert place_RK is not None
        assert seen_RL is not None
        K = pictures_RK.shape[1]
        tokens_RMD = projected_NPD[pictures_RK.clamp(min=0)].reshape(R, K * P, D)
        visible_RLK = (pictures_RK >= 0)[:, None] & (place_RK[:, None] < seen_RL[:, :, None])
        if group_RL is not None:
            visible_RLK = visible_RLK & (group_RK[:, None] == group_RL[:, :, None])
        return Memory(tokens_RMD, visible_RLK.repeat_interleave(P, dim=2))

    def rows(self, rows_K: Tensor) -> Memory:
        """These rows, as the last word of each sees its pictures: for the words that follow it."""
        return Memory(self.tokens_RMD[rows_K], self.visible_RLM[rows_K, -1:])


class GatedLayer(nn.Module):
    """x + tanh(a)·attention(x, pictures), then x + tanh(b)·feed-forward(x); a = b = 0 at the start, so that nothing changes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = (
            nn.Linear(width, width, bias=False),
            nn.Linear(width, 2 * width, bias=False),
        )
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        # one element, not zero dimensions: DeepSpeed's broadcast of the weights cannot send a scalar
        self.attention_gate, self.feed_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x_RLD: Tensor, memory: Memory) -> Tensor:
        q_RHLW = self._heads(self.query(self.norm(x_RLD)))
        keys_RMD, values_RMD = self.key_value(memory.tokens_RMD.to(x_RLD.dtype)).chunk(2, dim=-1)
        seen_RLM = memory.visible_RLM
        some_RL1 = seen_RLM.any(dim=-1, keepdim=True)
        # a word that sees no picture looks at them all and forgets it: softmax over nothing is no number
        mask = (seen_RLM | ~some_RL1).unsqueeze(1)
        read = F.scaled_dot_product_attention(
            q_RHLW, self._heads(keys_RMD), self._heads(values_RMD), attn_mask=mask
        )
        read_RLD = self.out(read.transpose(1, 2).flatten(2)) * some_RL1
        x_RLD = x_RLD + self.attention_gate.tanh() * read_RLD
        fed_RLD = self.down(F.gelu(self.up(self.feed_norm(x_RLD)))) * some_RL1
        out_RLD: Tensor = x_RLD + self.feed_gate.tanh() * fed_RLD
        return out_RLD

    def _heads(self, x_RLD: Tensor) -> Tensor:
        rows, columns, _ = x_RLD.shape
        return x_RLD.view(rows, columns, self.heads, -1).transpose(1, 2)


class GatedLayers(nn.Module):
    """A gated layer before every k-th block, hung in from outside.

    The memory travels as an argument `picture_memory` that the language model hands to its blocks: nothing is kept between
    calls, and activation checkpointing sees the whole layer outside of what it repeats.
    """

    def __init__(self, language: PreTrainedModel, every: int) -> None:
        super().__init__()
        config = language.config
        if config.model_type not in FAMILIES:
            cure = f"works with {', '.join(FAMILIES)}, not {config.model_type}; take concat"
            raise ConfigError("model.fusion", "cross_attention", cure)
        blocks = max(
            (child for child in language.base_model.modules() if isinstance(child, nn.ModuleList)), key=len
        )
        count = len(blocks) // every
        if not count:
            cure = f"the language model has {len(blocks)} blocks: take at most that"
            raise ConfigError("model.cross_attention_every", every, cure)
        self.layers = nn.ModuleList(
            GatedLayer(config.hidden_size, config.num_attention_heads) for _ in range(count)
        )
        for place, block in enumerate(blocks):
            gated = (place + 1) % every == 0
            hook = _BeforeBlock(self.layers[place // every] if gated else None)
            block.register_forward_pre_hook(hook, with_kwargs=True)

    def initialise(self, module: nn.Module) -> None:
        """Fresh weights of one of our own modules; others are left alone."""
        if isinstance(module, nn.Linear) and any(module is own for own in self.modules()):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


class _BeforeBlock:
    """Takes the memory out of a block's arguments, and where there is a gated layer, reads it; an object, to be copied whole."""

    def __init__(self, layer: nn.Module | None) -> None:
        self.layer = layer

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        memory = kwargs.pop("picture_memory", None)
        if self.layer is None or memory is None:
            return args, kwargs
        if args:
            return (self.layer(args[0], memory), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.layer(kwargs["hidden_states"], memory)}
