"""The compat presets against trl's conventions written out; the real trl runs in tests/e2e/test_trl_parity.py."""

from __future__ import annotations

import pytest
import torch

from fmray.rlhf.credit import credit
from fmray.rlhf.kl import AdaptiveKl, FixedKl
from fmray.rlhf.presets import PpoRules, compat_rules
from tests.unit.rlhf.batches import drawn_batch


def test_trl_1_12_by_hand() -> None:
    """One response of three tokens in four places: score behind it, critic asked once more, Bessel's variance."""
    rules = compat_rules("trl-1.12")
    assert rules.kl == FixedKl(0.05)
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4, 9.0]], dtype=torch.float64)
    logp, reference = torch.full((1, 5), -1.0), torch.full((1, 5), -1.5)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    found = credit(
        *(torch.tensor([2.0]), torch.tensor([True]), logp, reference, values, mask, torch.tensor([0])),
        rules.credit,
        0.05,
    )
    rewards = [-0.025, -0.025, -0.025, 2.0]
    assert found.rewards_BT[0].tolist() == pytest.approx([*rewards, 0.0])
    advantages, ahead = [], 0.0
    for t in (3, 2, 1, 0):
        following = float(values[0, t + 1]) if t < 3 else 0.0
        ahead = rewards[t] + following - float(values[0, t]) + 0.95 * ahead
        advantages.insert(0, ahead)
    assert found.returns_BT is not None
    expected = [a + float(v) for a, v in zip(advantages, values[0], strict=False)]
    assert found.returns_BT[0].tolist() == pytest.approx([*expected, 0.0])
    real = torch.tensor(advantages[:3], dtype=torch.float64)
    assert found.advantages_BT[0, :3].tolist() == pytest.approx(
        ((real - real.mean()) / (real.var() + 1e-8).sqrt()).tolist(), rel=1e-5
    )
    assert (rules.loss.token_mean, rules.loss.old_logp) == ("micro_batch", "rollout")


def test_trl_0_11_leaves_out_the_first_token_of_encoder_decoders_alone() -> None:
    batch = drawn_batch(4, 6, 0)
    rules = compat_rules("trl-0.11")
    assert rules.kl == AdaptiveKl(0.2, target=6.0, horizon=10_000)
    assert rules.loss.ratio_threshold == 10.0
    assert not credit(*batch.arguments(), rules.credit, 0.2).policy_mask_BT[:, 0].any()
    decoder_only = compat_rules("trl-0.11", encoder_decoder=False)
    assert torch.equal(credit(*batch.arguments(), decoder_only.credit, 0.2).policy_mask_BT, batch.mask_BT)


def test_the_default_is_neither_and_other_names_are_refused() -> None:
    assert PpoRules() not in (compat_rules("trl-1.12"), compat_rules("trl-0.11"))
    with pytest.raises(ValueError, match=r"trl-1\.16.*trl-0\.11"):
        compat_rules("trl-1.16")  # type: ignore[arg-type]
