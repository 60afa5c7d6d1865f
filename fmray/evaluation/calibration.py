"""How far a model's confidence can be believed. This file's functions need nothing but tensors.

N verdicts  C outcomes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ConfidenceBin:
    """Verdicts that were given with like confidence. `ConfidenceBin(0.9, 1.0, 412, 0.97, 0.95)`"""

    low: float
    high: float
    count: int
    accuracy: float
    """Share that was right."""
    confidence: float
    """Mean probability of the outcome that was chosen."""


def by_confidence(confidence_N: Tensor, right_N: Tensor, bins: int, lowest: float) -> list[ConfidenceBin]:
    """Equally wide bins from `lowest` (a chance verdict's confidence, 1/C) to 1; empty ones are left out.

    confidence_N: probability of the chosen outcome; right_N: 1 where it was right, 0 where not, ½ for a tie.
    """
    edges = torch.linspace(lowest, 1.0, bins + 1, dtype=torch.float64)
    place_N = torch.bucketize(confidence_N.double(), edges[1:-1], right=True)
    found = []
    for index in range(bins):
        inside = place_N == index
        if count := int(inside.sum()):
            accuracy, confidence = (
                float(right_N[inside].double().mean()),
                float(confidence_N[inside].double().mean()),
            )
            found.append(
                ConfidenceBin(float(edges[index]), float(edges[index + 1]), count, accuracy, confidence)
            )
    return found


def expected_calibration_error(bins: list[ConfidenceBin]) -> float:
    """Σ share of verdicts · |accuracy − confidence| over the bins, in 0..1 (Guo et al. 2017, equation 3)."""
    total = sum(bin.count for bin in bins)
    return sum(bin.count * abs(bin.accuracy - bin.confidence) for bin in bins) / total


def brier_score(probability_NC: Tensor, outcome_N: Tensor) -> float:
    """Mean Σ_c (p_c − [c is the outcome])², in 0..2; always ½ on two outcomes is 0.5 (Brier 1950)."""
    truth_NC = torch.nn.functional.one_hot(outcome_N, probability_NC.shape[1]).to(probability_NC)
    return float(((probability_NC - truth_NC) ** 2).sum(1).mean())
