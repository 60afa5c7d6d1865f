"""What the roles hand to each other: requests, rollouts, and what was said of them. B rows  P prompt  T response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Ask for answers: a fixed set of samples, so that any replica gives the same ones.

    `RolloutRequest(version=3, seed=0, sample_ids=(64, 65), prompts=(7, 7), prompt_ids=((571, 1), (571, 1)), texts=("A", "A"))`
    """

    version: int
    """The weights that must answer."""
    seed: int
    sample_ids: tuple[int, ...]
    """Unique in the run; the sampling noise is a function of (seed, sample id, position)."""
    prompts: tuple[int, ...]
    """The prompt's number, per sample: equal numbers are samples of the same prompt."""
    prompt_ids: tuple[tuple[int, ...], ...]
    """Token ids per sample, without padding."""
    texts: tuple[str, ...]
    """The prompts as text, for the rewards and for people."""
    pixels_BCHW: Tensor | None = None
    """uint8 [B, 3, H, W] for a vision-language policy."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Sampled answers. Token ids are those that were sampled: they are never made from text again."""

    sample_id_B: Tensor
    """int64 [B]."""
    prompt_B: Tensor
    """int64 [B], equal for samples of one prompt."""
    version_B: Tensor
    """int64 [B], the weights that made the sample."""
    prompt_ids_BP: Tensor
    """int64 [B, P], left-padded."""
    prompt_mask_BP: Tensor
    """int64 [B, P], 1 at real tokens."""
    response_ids_BT: Tensor
    """int64 [B, T], right-padded; ends with EOS where `ended`."""
    mask_BT: Tensor
    """float32 [B, T], 1 at real response tokens, EOS included; by length, never by id."""
    rollout_logp_BT: Tensor
    """float32 [B, T], log-probability under the sampling distribution, 0 at padding."""
    ended_B: Tensor
    """bool [B], whether EOS came before the limit."""
    prompts: tuple[str, ...]
    """The prompts as text."""
    responses: tuple[str, ...]
    """The answers as text, special tokens left out."""
    pixels_BCHW: Tensor | None = None
    """uint8 [B, 3, H, W] for a vision-language policy."""

    def __len__(self) -> int:
        return self.sample_id_B.shape[0]

    @property
    def tokens(self) -> int:
        """Real response tokens."""
        return int(self.mask_BT.sum())

    def rows(self, rows: Tensor) -> Self:
        """Some samples, in the given order."""
        picked: dict[str, Any] = {
            field.name: value[rows] if isinstance(value, Tensor) else tuple(value[i] for i in rows.tolist())
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return replace(self, **picked)

    def on(self, device: torch.device) -> Self:
        """The tensors on a device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    @classmethod
    def together(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """One batch of several, padded to the longest: prompts to the left, responses to the right."""
        prompt, response = (
            max(p.prompt_ids_BP.shape[1] for p in parts),
            max(p.response_ids_BT.shape[1] for p in parts),
        )
        left, right = {"prompt_ids_BP", "prompt_mask_BP"}, {"response_ids_BT", "mask_BT", "rollout_logp_BT"}

        def joined(name: str) -> Tensor | tuple[str, ...] | None:
            values = [getattr(part, name) for part in parts]
            if values[0] is None:
                return None
            if isinstance(values[0], tuple):
                return tuple(text for value in values for text in value)
            if name in left:
                values = [torch.nn.functional.pad(v, (prompt - v.shape[1], 0)) for v in values]
            if name in right:
                values = [pad_right(v, response) for v in values]
            return torch.cat(values)

        return cls(**{field.name: joined(field.name) for field in fields(cls)})  # type: ignore[arg-type]


def pad_right(values_BT: Tensor, length: int) -> Tensor:
    """Zeros behind each row up to a length."""
    return torch.nn.functional.pad(values_BT, (0, length - values_BT.shape[1]))


@dataclass(frozen=True, slots=True)
class Scores:
    """What one reward said of a batch.

    `Scores(torch.tensor([0.3, nan]), failures=("sample 65: timed out after 30 s",))`
    """

    raw_B: Tensor
    """float32 [B]; NaN where the sample could not be scored."""
    failures: tuple[str, ...] = ()
    """A line for each NaN."""
