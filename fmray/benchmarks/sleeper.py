"""A role that sleeps, in a file that imports little: there are 64 of it on one machine."""

from __future__ import annotations

import time

import torch

from fmray.rlhf.records import RolloutRequest, Rollouts
from fmray.runtime.pool import Place


class Sleeper:
    """A rollout policy whose answers take as long as they are told to, and carry what a real one's carry."""

    def __init__(self, new_tokens: int, place: Place) -> None:
        self._new_tokens = new_tokens

    def answer(self, asked: tuple[RolloutRequest, float]) -> tuple[Rollouts, float]:
        """The samples, and the seconds inside the role. Prompts are of one length."""
        started = time.perf_counter()
        request, seconds = asked
        rows, tokens = len(request.sample_ids), self._new_tokens
        ids_BP = torch.tensor(request.prompt_ids)
        time.sleep(max(0.0, seconds - (time.perf_counter() - started)))
        answers = Rollouts(
            sample_id_B=torch.tensor(request.sample_ids),
            prompt_B=torch.tensor(request.prompts),
            version_B=torch.full((rows,), request.version),
            prompt_ids_BP=ids_BP,
            prompt_mask_BP=torch.ones_like(ids_BP),
            response_ids_BT=torch.ones(rows, tokens, dtype=torch.int64),
            mask_BT=torch.ones(rows, tokens),
            rollout_logp_BT=torch.zeros(rows, tokens),
            ended_B=torch.ones(rows, dtype=torch.bool),
            prompts=request.texts,
            responses=request.texts,
            pixels_BCHW=request.pixels_BCHW,
        )
        return answers, time.perf_counter() - started
