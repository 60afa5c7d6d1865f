"""What the roles hand to each other: requests, rollouts, and what was said of them. B rows  P prompt  T response tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    pictures: tuple[str, ...] | None = None
    """The keys of these pictures."""
    answers: tuple[tuple[str, ...], ...] | None = None
    """What may be said, per sample; None where prompts are no questions."""


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
    pictures: tuple[str, ...] | None = None
    """The keys of these pictures."""
    answers: tuple[tuple[str, ...], ...] | None = None
    """What may be said to each prompt; None where prompts are no questions."""

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

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {
            field.name: value
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }

    def texts(self) -> dict[str, tuple[Any, ...]]:
        """The fields that are texts, by name."""
        return {
            field.name: value
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), tuple)
        }

    def told(self, row: int) -> dict[str, Any]:
        """A sample for people: prompt, response and, for a question about a picture, the picture's key and the answers."""
        told: dict[str, Any] = {"prompt": self.prompts[row], "response": self.responses[row]}
        if self.pictures is not None:
            told["picture"] = self.pictures[row]
        if self.answers is not None:
            told["answers"] = list(self.answers[row])
        return told

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], texts: Mapping[str, Any]) -> Self:
        """From what `tensors` and `texts` gave, JSON between them or not (which makes lists of tuples)."""
        told: dict[str, Any] = dict(tensors)
        told |= {
            field.name: tuple(tuple(said) if isinstance(said, list) else said for said in texts[field.name])
            for field in fields(cls)
            if texts.get(field.name) is not None
        }
        return cls(**told)

    def on(self, device: torch.device) -> Self:
        """The tensors on a device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def padded_to(self, prompt: int, response: int) -> Self:
        """The same samples with wider padding: prompts to the left, responses to the right."""
        left = prompt - self.prompt_ids_BP.shape[1]
        return replace(
            self,
            prompt_ids_BP=torch.nn.functional.pad(self.prompt_ids_BP, (left, 0)),
            prompt_mask_BP=torch.nn.functional.pad(self.prompt_mask_BP, (left, 0)),
            response_ids_BT=pad_right(self.response_ids_BT, response),
            mask_BT=pad_right(self.mask_BT, response),
            rollout_logp_BT=pad_right(self.rollout_logp_BT, response),
        )

    @classmethod
    def together(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """One batch of several, padded to the longest."""
        prompt = max(part.prompt_ids_BP.shape[1] for part in parts)
        response = max(part.response_ids_BT.shape[1] for part in parts)
        padded = [part.padded_to(prompt, response) for part in parts]
        joined: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in padded]
            if isinstance(values[0], Tensor):
                joined[field.name] = torch.cat(values)
            elif isinstance(values[0], tuple):
                joined[field.name] = tuple(text for texts in values for text in texts)
        return cls(**joined)


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
