"""From the `ppo` section to the rules that the maths takes."""

from __future__ import annotations

from dataclasses import replace

from fmray.config.rlhf import RlhfConfig
from fmray.rlhf.kl import AdaptiveKl, FixedKl, KlController
from fmray.rlhf.presets import PpoRules, compat_rules


def rules_of(config: RlhfConfig, *, encoder_decoder: bool) -> PpoRules:
    """fmray's conventions, or with `ppo.compat` another trainer's; the numbers (clip, λ, KL, …) are always the section's."""
    ppo = config.ppo
    start = compat_rules(ppo.compat, encoder_decoder=encoder_decoder) if ppo.compat else PpoRules()
    penalty = ppo.missing_eos_penalty
    credit = replace(
        start.credit,
        advantage=ppo.advantage,
        gamma=ppo.gamma,
        lam=ppo.lam,
        kl=ppo.kl.estimator,
        kl_in=ppo.kl.place,
        missing_eos=None if penalty is None else ("penalty", penalty),
        whiten_rewards=ppo.whiten_rewards,
        whiten_advantages=ppo.whiten_advantages if ppo.advantage == "gae" else None,
    )
    cap = config.rollout.importance_cap if start.loss.importance_cap is not None else None
    loss = replace(
        start.loss,
        clip=ppo.clip,
        value_clip=ppo.value_clip,
        value_coefficient=ppo.value_coefficient,
        entropy_coefficient=ppo.entropy_coefficient,
        epochs=ppo.epochs,
        importance_cap=cap,
    )
    kl: KlController = FixedKl(ppo.kl.coefficient)
    if ppo.kl.controller == "adaptive":
        kl = AdaptiveKl(ppo.kl.coefficient, ppo.kl.target, ppo.kl.horizon)
    return PpoRules(credit, loss, kl)
