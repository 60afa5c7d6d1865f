"""KL estimators against the true divergence of a toy distribution, and the controllers against Ziegler's rule."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmray.rlhf.kl import AdaptiveKl, FixedKl, KlEstimator, kl_estimate, kl_from_state, kl_state

POLICY = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
REFERENCE = torch.tensor([0.25, 0.25, 0.3, 0.2], dtype=torch.float64)
TRUE_KL = float((POLICY * (POLICY / REFERENCE).log()).sum())
ESTIMATORS: tuple[KlEstimator, ...] = ("k1", "k2", "k3")


@given(st.floats(-8, 8))
def test_6_12_kl_values_match_closed_form(log_ratio: float) -> None:
    logp, reference = torch.tensor([[-9.0 + log_ratio]]).double(), torch.tensor([[-9.0]]).double()
    d = float(logp - reference)
    expected = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}
    for kind in ESTIMATORS:
        assert kl_estimate(logp, reference, kind).item() == pytest.approx(expected[kind], rel=1e-9, abs=1e-12)
    assert kl_estimate(logp, reference, "k3").item() >= 0


def test_6_12_monte_carlo_means_of_k1_and_k3_are_the_true_kl() -> None:
    draws = torch.multinomial(POLICY, 400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    logp, reference = POLICY.log()[draws], REFERENCE.log()[draws]
    spread = {kind: kl_estimate(logp, reference, kind).std().item() for kind in ESTIMATORS}
    for kind in ("k1", "k3"):
        standard_error = spread[kind] / math.sqrt(len(draws))
        assert kl_estimate(logp, reference, kind).mean().item() == pytest.approx(
            TRUE_KL, abs=4 * standard_error
        )
    biased = abs(kl_estimate(logp, reference, "k2").mean().item() - TRUE_KL)
    assert biased > 10 * spread["k2"] / math.sqrt(len(draws)), "k2 is biased, and the test would see it"
    assert spread["k3"] < spread["k1"], "what k3 is for"


def test_as_a_loss_only_k2_has_the_gradient_of_the_kl() -> None:
    """Exact expectations over the policy's four tokens: what each estimator does to the policy's logits."""
    logits = POLICY.log().clone().requires_grad_()
    kl = (logits.softmax(0) * (logits.log_softmax(0) - REFERENCE.log())).sum()
    (true_gradient,) = torch.autograd.grad(kl, logits)
    reversed_kl = (REFERENCE * (REFERENCE.log() - logits.log_softmax(0))).sum()
    (reversed_gradient,) = torch.autograd.grad(reversed_kl, logits)
    gradients = {}
    for kind in ESTIMATORS:
        on_average = (POLICY * kl_estimate(logits.log_softmax(0), REFERENCE.log(), kind)).sum()
        (gradients[kind],) = torch.autograd.grad(on_average, logits)
    assert torch.allclose(gradients["k2"], true_gradient, atol=1e-12)
    assert torch.allclose(gradients["k1"], torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(gradients["k3"], reversed_gradient, atol=1e-12)
    assert not torch.allclose(true_gradient, reversed_gradient, atol=1e-2)


def test_a_forgotten_token_stays_finite_under_the_clamp() -> None:
    logp, reference = torch.tensor([[-200.0, -1.0]], requires_grad=True), torch.tensor([[-1.0, -1.5]])
    assert kl_estimate(logp, reference, "k3")[0, 0].isinf()
    clamped = kl_estimate(logp, reference, "k3", clamp=10.0)
    assert clamped[0, 0].item() == pytest.approx(math.exp(10) - 11)
    (gradient,) = torch.autograd.grad(clamped.sum(), logp)
    assert gradient[0, 0].item() == 0
    assert torch.equal(clamped[0, 1], kl_estimate(logp, reference, "k3")[0, 1])


def test_half_precision_is_widened_before_the_difference() -> None:
    logp, reference = torch.tensor([[-3.0]]).bfloat16(), torch.tensor([[-3.0625]]).bfloat16()
    assert kl_estimate(logp, reference).dtype == torch.float32
    assert kl_estimate(logp, reference).item() == 0.0625


def test_an_unknown_estimator_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"k4.*k1, k2 or k3"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- controllers


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 64 / 10_000),
        (5.4, 1 - 0.1 * 64 / 10_000),
        (60.0, 1 + 0.2 * 64 / 10_000),  # the error is clipped
        (0.0, 1 - 0.2 * 64 / 10_000),
        (-3.0, 1 - 0.2 * 64 / 10_000),  # k1 may be negative
    ],
)
def test_6_13_adaptive_controller_follows_zieglers_rule(kl: float, factor: float) -> None:
    before = AdaptiveKl(0.2)
    assert (before.target, before.horizon) == (6.0, 10_000)
    assert before.updated(kl, samples=64).coefficient == pytest.approx(0.2 * factor, rel=1e-12)
    assert before.coefficient == 0.2


def test_6_13_the_controller_moves_the_kl_it_controls_to_its_target() -> None:
    """A policy whose sequence KL is 1.2 / coefficient nats: the loop settles at coefficient 0.2, KL 6."""
    controller = AdaptiveKl(0.02)
    for _ in range(3000):
        controller = controller.updated(1.2 / controller.coefficient, samples=64)
    assert 1.2 / controller.coefficient == pytest.approx(6.0, rel=1e-3)


def test_6_13_the_state_goes_through_a_checkpoint_to_the_last_bit() -> None:
    controller = AdaptiveKl(0.1, target=3.0, horizon=500)
    for kl in (7.1, 2.2, 9.9):
        controller = controller.updated(kl, samples=16)
    for kept in (controller, FixedKl(0.05)):
        assert kl_from_state(json.loads(json.dumps(kl_state(kept)))) == kept
    with pytest.raises(ValueError, match="linear"):
        kl_from_state({"kind": "linear", "coefficient": 0.1})


def test_a_fixed_coefficient_stays_and_a_broken_measure_is_refused() -> None:
    assert FixedKl(0.05).updated(40.0, samples=512) == FixedKl(0.05)
    with pytest.raises(ValueError, match="sequence_kl=nan"):
        AdaptiveKl(0.2).updated(float("nan"), samples=8)
