"""Does a reward model judge as people did? Accuracy, accuracy by confidence, calibration, on every held-out part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.config.reward import RewardEvaluateConfig
from fmray.data.text_batches import TokenRows, right_padded, token_rows
from fmray.data.verdicts import Verdict, spread
from fmray.evaluation.calibration import ConfidenceBin, brier_score, by_confidence, expected_calibration_error
from fmray.evaluation.embed import measuring
from fmray.models.reward_model import Scorer
from fmray.runtime.context import Context
from fmray.types import Metrics


@dataclass(frozen=True, slots=True)
class Judged:
    """What was found on one held-out part."""

    metrics: Metrics
    bins: list[ConfidenceBin]

    def described(self) -> list[dict[str, Any]]:
        """The bins for `evaluation.json`."""
        return [asdict(bin) for bin in self.bins]


def score_tokens(scorer: Scorer, texts: Sequence[Sequence[int]], batch_size: int, context: Context) -> Tensor:
    """Logits of every text, float32 [N, C] on the CPU, the same on every rank; each rank scores its share of them.

    Texts of like length are scored together; the model stays in the mode it was in.
    """
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    mine = order[context.rank :: context.world_size]
    rows = -(-len(texts) // context.world_size)  # all ranks' shares padded to the same length
    logits = torch.zeros(rows, len(scorer.labels))
    with measuring(scorer.model):
        for start in range(0, len(mine), batch_size):
            chosen = [texts[index] for index in mine[start : start + batch_size]]
            ids, mask = right_padded(chosen, scorer.tokenizer.pad_token_id)
            device = context.device
            logits[start : start + len(chosen)] = scorer.logits(ids.to(device), mask.to(device)).cpu()
    gathered = context.gather(logits.to(context.device)).cpu().view(context.world_size, rows, -1)
    found = torch.empty(len(texts), logits.shape[1])
    for rank in range(context.world_size):
        places = order[rank :: context.world_size]
        found[places] = gathered[rank, : len(places)]
    return found


def evaluate_verdicts(
    scorer: Scorer,
    parts: Mapping[str, Sequence[Verdict]],
    evaluate: RewardEvaluateConfig,
    context: Context,
) -> tuple[Metrics, dict[str, list[dict[str, Any]]]]:
    """`eval/<part>/accuracy` and its company, and each part's table of accuracy by confidence; the same on every rank."""
    metrics: Metrics = {}
    tables = {}
    for name, verdicts in parts.items():
        chosen = spread(tuple(verdicts), evaluate.max_samples)
        rows = token_rows(chosen, scorer.tokenize)
        logits_NC = score_tokens(scorer, [ids for row in rows for ids in row], evaluate.batch_size, context)
        labelled = len(scorer.labels) > 1
        found = (judge_labels if labelled else judge_orders)(logits_NC, chosen, rows, evaluate.bins)
        metrics |= {f"eval/{name}/{key}": value for key, value in found.metrics.items()}
        tables[name] = found.described()
    return metrics, tables


def judge_labels(logits_NC: Tensor, verdicts: Sequence[Verdict], rows: TokenRows, bins: int) -> Judged:
    """Labelled texts: accuracy beside the share of the commonest label."""
    label_N = torch.tensor([verdict.label for verdict in verdicts])
    probability_NC = logits_NC.double().softmax(1)
    confidence_N, chosen_N = probability_NC.max(1)
    right_N = (chosen_N == label_N).double()
    commonest = float(label_N.bincount().max()) / len(label_N)
    metrics = {"commonest_label": commonest, "log_loss": float(F.cross_entropy(logits_NC.double(), label_N))}
    return _judged(metrics, probability_NC, label_N, confidence_N, right_N, bins)


def judge_orders(logits_N1: Tensor, verdicts: Sequence[Verdict], rows: TokenRows, bins: int) -> Judged:
    """Pairs and rankings, over every two answers of a row: a tie is half right; beside it, how far length alone would get.

    `best_first`: share of rows whose best answer scores highest.
    """
    scores = torch.split(logits_N1[:, 0].double(), [len(row) for row in rows])
    ahead, longer, firsts = [], [], []
    for score_K, row in zip(scores, rows, strict=True):
        better, worse = torch.triu_indices(len(row), len(row), offset=1)
        length_K = torch.tensor([float(len(ids)) for ids in row])
        ahead.append(score_K[better] - score_K[worse])
        longer.append(length_K[better] - length_K[worse])
        firsts.append(float(score_K[0] > score_K[1:].max()))
    ahead_P = torch.cat(ahead)
    probability_P2 = torch.stack([ahead_P.sigmoid(), (-ahead_P).sigmoid()], dim=1)
    by_length = float(_won(torch.cat(longer)).mean())
    metrics = {
        "best_first": sum(firsts) / len(firsts),
        "mean_lead": float(ahead_P.mean()),
        "by_length_alone": max(by_length, 1 - by_length),
        "log_loss": float(-F.logsigmoid(ahead_P).mean()),
    }
    outcome_P = torch.zeros(len(ahead_P), dtype=torch.int64)
    return _judged(metrics, probability_P2, outcome_P, probability_P2.max(1).values, _won(ahead_P), bins)


def _won(lead_P: Tensor) -> Tensor:
    """1 where the lead is positive, ½ where there is none."""
    return (lead_P.sign().double() + 1) / 2


def _judged(
    more: Metrics, probability_NC: Tensor, outcome_N: Tensor, confidence_N: Tensor, right_N: Tensor, bins: int
) -> Judged:
    table = by_confidence(confidence_N, right_N, bins, lowest=1 / probability_NC.shape[1])
    metrics = {
        "accuracy": float(right_N.mean()),
        "calibration_error": expected_calibration_error(table),
        "brier": brier_score(probability_NC, outcome_N),
    }
    return Judged(metrics | more, table)
