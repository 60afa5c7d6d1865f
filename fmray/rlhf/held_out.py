"""How good the policy is on prompts that it never learned from: raw rewards, KL, diversity."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import torch

from fmray.models.language import adapter_off
from fmray.rlhf.experience import Judged
from fmray.rlhf.learner import PpoLearner
from fmray.rlhf.ppo import on_all_rows
from fmray.runtime.context import Context
from fmray.types import Metrics


def evaluate(learner: PpoLearner, version: int, context: Context) -> Metrics:
    """`eval/…` of the published version: every sample's noise is the same at each call. A collective.

    `eval/<reward>/raw` is the raw mean. `eval/score` is Σ weight · (raw - mean) / deviation with the starting policy's means and
    deviations on the same prompts, so it is 0 at the start; `eval/score_std` is its deviation over samples.
    """
    started = time.perf_counter()
    judged = learner.crew.on_test_prompts(version)
    learner.bank.count_failures(judged.raw, judged.rollouts, judged.failures)
    metrics = scores_of(judged, learner)
    rollouts, mask_BT = judged.rollouts, judged.rollouts.mask_BT
    reference_BT = judged.reference_logp_BT
    if reference_BT is None:
        real_BT = mask_BT.bool()
        with adapter_off(learner.model.policy):
            reference_BT = on_all_rows(learner, rollouts, real_BT, real_BT, context)["logp_BT"]
    kl_B = ((rollouts.rollout_logp_BT - reference_BT) * mask_BT).sum(1)
    metrics |= {
        "eval/kl": kl_B.mean().item(),
        "eval/length": mask_BT.sum(1).mean().item(),
        "eval/eos_rate": rollouts.ended_B.float().mean().item(),
        "eval/distinct2": distinct(rollouts.responses, 2),
        "time/evaluate": time.perf_counter() - started,
    }
    if context.rank == 0:
        write_texts(judged, version, context)
    return metrics


def scores_of(judged: Judged, learner: PpoLearner) -> Metrics:
    """Raw means and deviations of each reward, and the weighted sum in units of the starting policy's."""
    metrics: Metrics = {}
    score_B = torch.zeros(len(judged.rollouts))
    for name, raw_B in judged.raw.items():
        valid = raw_B[~raw_B.isnan()]
        mean, std = valid.mean().item(), valid.std(correction=0).item()
        start_mean, start_std = learner.starting_scores.setdefault(name, (mean, std))
        metrics |= {f"eval/{name}/raw": mean, f"eval/{name}/raw_std": std}
        unit = (
            start_std if start_std > 1e-6 else 1.0
        )  # a reward that was the same everywhere has no unit of its own
        score_B += learner.config.rewards[name].weight * (raw_B - start_mean) / unit
    scored = score_B[~score_B.isnan()]
    return metrics | {
        "eval/score": scored.mean().item(),
        "eval/score_std": scored.std(correction=0).item(),
    }


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of all texts, 0..1 (Li et al. 2016); 0 where there is none."""
    split = [text.split() for text in texts]
    grams = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def write_texts(judged: Judged, version: int, context: Context) -> None:
    """`held_out/version-00000012.jsonl`: every prompt, answer and raw reward, for the report and for other judges."""
    lines = []
    for index in range(len(judged.rollouts)):
        row: dict[str, object] = judged.rollouts.told(index)
        row |= {name: raw_B[index].item() for name, raw_B in judged.raw.items()}
        lines.append(json.dumps(row, ensure_ascii=False))
    context.folder.write_text("\n".join(lines) + "\n", "held_out", f"version-{version:08d}.jsonl")
