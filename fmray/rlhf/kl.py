"""How far the policy is from its reference, and how dear that is. B rows  T response tokens. Imports torch alone.

Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html), for tokens x sampled from the policy π, with
d = log π(x) − log π_ref(x):  k1 = d, unbiased, of either sign;  k2 = d²/2, biased, of small variance;  k3 = exp(−d) − 1 + d,
unbiased, never negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fmray.rlhf.sums import wide

KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logp_BT: Tensor, reference_logp_BT: Tensor, kind: KlEstimator = "k1", clamp: float | None = None
) -> Tensor:
    """Estimate of KL(π‖π_ref) in nats at each sampled token, float32 [B, T] (float64 of float64), differentiable in both.

    `clamp` limits the log-ratio to ±clamp before the estimate, so that k3 of a token that the policy has all but forgotten
    stays finite. As a *loss* only k2 has the gradient of KL(π‖π_ref) on the policy's own samples: k1's is zero on average
    and k3's is that of KL(π_ref‖π) (Tang & Munos 2025, arXiv 2506.09477; Liu et al. 2025, arXiv 2510.01555).
    """
    log_ratio_BT = wide(logp_BT) - wide(reference_logp_BT)
    if clamp is not None:
        log_ratio_BT = log_ratio_BT.clamp(-clamp, clamp)
    if kind == "k1":
        return log_ratio_BT
    if kind == "k2":
        return log_ratio_BT.square() / 2
    if kind == "k3":
        return torch.expm1(-log_ratio_BT) + log_ratio_BT
    raise ValueError(f"kl estimator {kind!r}: must be k1, k2 or k3")


@dataclass(frozen=True, slots=True)
class FixedKl:
    """A coefficient that stays."""

    coefficient: float

    def updated(self, sequence_kl: float, samples: int) -> FixedKl:
        """Itself, whatever was measured."""
        return self


@dataclass(frozen=True, slots=True)
class AdaptiveKl:
    """A coefficient that grows where the KL is above its target and shrinks below it (Ziegler et al. 2019, section 2.2).

    `AdaptiveKl(0.2).updated(sequence_kl=12.0, samples=64).coefficient` is `0.2 · (1 + 0.2 · 64 / 10_000)`.
    """

    coefficient: float
    target: float = 6.0
    """Nats per sequence: the KL summed over a response's tokens, not their mean."""
    horizon: int = 10_000
    """Samples in which a lasting error of the full 20 % would multiply the coefficient by about e^0.2."""

    def updated(self, sequence_kl: float, samples: int) -> AdaptiveKl:
        """The controller after a batch.

        sequence_kl: nats; the estimate summed over each response's tokens, then the mean over the samples of all ranks.
        samples: how many they were, all ranks' together. Raises ValueError where the measure is not a number.
        """
        if not math.isfinite(sequence_kl):
            raise ValueError(
                f"sequence_kl={sequence_kl}: the policy's or the reference's log-probabilities are broken"
            )
        error = min(max(sequence_kl / self.target - 1, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1 + error * samples / self.horizon))


KlController = FixedKl | AdaptiveKl


def kl_state(controller: KlController) -> dict[str, Any]:
    """A checkpoint's words for a controller: `{"kind": "adaptive", "coefficient": 0.2, "target": 6.0, "horizon": 10000}`."""
    kind = "adaptive" if isinstance(controller, AdaptiveKl) else "fixed"
    return {"kind": kind, **asdict(controller)}


def kl_from_state(state: Mapping[str, Any]) -> KlController:
    """The controller that `kl_state` described; raises ValueError for any other kind."""
    values = {name: value for name, value in state.items() if name != "kind"}
    if state.get("kind") == "adaptive":
        return AdaptiveKl(**values)
    if state.get("kind") == "fixed":
        return FixedKl(**values)
    raise ValueError(f"kl controller {state.get('kind')!r}: must be fixed or adaptive")
