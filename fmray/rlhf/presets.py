"""Whole sets of rules: fmray's own, and those that reproduce two versions of trl. Needs torch alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fmray.rlhf.credit import CreditRules
from fmray.rlhf.kl import AdaptiveKl, FixedKl, KlController
from fmray.rlhf.losses import LossRules

Compat = Literal["trl-1.12", "trl-0.11"]


@dataclass(frozen=True, slots=True)
class PpoRules:
    """`PpoRules()` is fmray's: score at the last token, whitening over all ranks, mean over the mini-batch's tokens."""

    credit: CreditRules = field(default_factory=CreditRules)
    loss: LossRules = field(default_factory=LossRules)
    kl: KlController = field(default_factory=lambda: FixedKl(0.05))


def compat_rules(name: Compat, *, encoder_decoder: bool = True) -> PpoRules:
    """The default arithmetic of `trl.experimental.ppo` 1.12.0, or of `PPOTrainer` 0.11.4, to the last convention.

    Both: Bessel's variance on each rank alone; the mean of each micro-batch's tokens (accelerate divides it by the number of
    accumulated micro-batches); value loss clipped at 0.2, weighted 0.1; no importance weights.

    `trl-1.12`: old log-probabilities from generation at temperature + 1e-7; the score one place behind the last token, where
    the critic is asked too; fixed KL 0.05. Its `missing_eos_penalty=x` is `missing_eos=("penalty", x)`; its `whiten_rewards` and
    `kl_estimator="k3"` are ours of that name. Its optimizer steps once an epoch whatever `num_mini_batches` says: accelerate
    counts micro-batches, and accumulates a whole batch of them.

    `trl-0.11`: old log-probabilities of a forward pass; with an encoder-decoder policy each response's first token is left out of
    masks and means (`encoder_decoder`); adaptive KL 0.2 → 6 nats over 10 000 samples; micro-batches whose mean ratio exceeds 10
    are not learned from. Its `whiten_rewards=True` is not reproduced: it whitens padding to non-zero rewards, which then
    flow into the advantages of real tokens.
    """
    if name == "trl-1.12":
        return PpoRules(
            CreditRules(score_at="after_last", value_mask="plus_one", whiten_scope="rank"),
            LossRules(
                token_mean="micro_batch", old_logp="rollout", importance_cap=None, temperature_offset=1e-7
            ),
            FixedKl(0.05),
        )
    if name == "trl-0.11":
        return PpoRules(
            CreditRules(skip_first_token=encoder_decoder, whiten_scope="rank"),
            LossRules(token_mean="micro_batch", importance_cap=None, ratio_threshold=10.0),
            AdaptiveKl(0.2, target=6.0, horizon=10_000),
        )
    raise ValueError(f"compat {name!r}: must be trl-1.12 or trl-0.11")
