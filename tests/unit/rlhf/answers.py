"""Samples to judge."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fmray.rlhf.records import Rollouts

TEXTS = (
    "the film was good .",
    "bad",
    "a very bad film and the dog was good !",
    "",
    "don't watch it , it is bad .",
)


def answers(
    responses: Sequence[str] = TEXTS,
    prompts: Sequence[str] | None = None,
    ids: Sequence[Sequence[int]] | None = None,
    ended: Sequence[bool] | None = None,
) -> Rollouts:
    """Rollouts with these texts; the token ids are made up where a test does not care for them."""
    rows = [list(row) for row in ids] if ids is not None else [[7] * (1 + len(r.split())) for r in responses]
    count, longest = len(rows), max(map(len, rows), default=0)
    padded = [row + [0] * (longest - len(row)) for row in rows]
    mask = [[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows]
    return Rollouts(
        sample_id_B=torch.arange(60, 60 + count),
        prompt_B=torch.arange(count),
        version_B=torch.zeros(count, dtype=torch.int64),
        prompt_ids_BP=torch.ones(count, 1, dtype=torch.int64),
        prompt_mask_BP=torch.ones(count, 1, dtype=torch.int64),
        response_ids_BT=torch.tensor(padded, dtype=torch.int64).reshape(count, longest),
        mask_BT=torch.tensor(mask).reshape(count, longest),
        rollout_logp_BT=torch.zeros(count, longest),
        ended_B=torch.tensor([True] * count if ended is None else list(ended)),
        prompts=tuple(prompts) if prompts is not None else tuple(f"prompt {i}" for i in range(count)),
        responses=tuple(responses),
    )
