"""The losses of reward models: closed forms, gradients, and what must not change them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from fmray.objectives.preference import (
    all_pairs,
    classification,
    pair_differences,
    pairwise,
    plackett_luce,
)

SCORES = torch.tensor([[1.0, -0.5, 0.25], [0.0, 2.0, -1.0]], dtype=torch.float64)
RANKINGS = pytest.mark.parametrize("loss", [all_pairs, plackett_luce])
Loss = Callable[..., torch.Tensor]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_pairwise_closed_form() -> None:
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    expected = -(log_sigmoid(0.5) + log_sigmoid(-3.0)) / 2
    assert pairwise(chosen, rejected).item() == pytest.approx(expected)
    expected = -(log_sigmoid(0.5 - 1.0) + log_sigmoid(-3.0 - 0.25)) / 2
    assert pairwise(chosen, rejected, torch.tensor([1.0, 0.25])).item() == pytest.approx(expected)


def test_pairwise_gradient_is_the_probability_of_the_wrong_order() -> None:
    chosen, rejected = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([0.5, 1.0])
    pairwise(chosen, rejected).backward()
    wrong = torch.sigmoid(rejected - chosen.detach())
    assert torch.allclose(chosen.grad, -wrong / 2)  # type: ignore[arg-type]


def test_pairwise_survives_scores_far_apart() -> None:
    far = torch.tensor([1e4], requires_grad=True)
    loss = pairwise(-far, far)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()


def test_plackett_luce_is_a_product_of_choices() -> None:
    total = 0.0
    for row in SCORES.tolist():
        for i in range(3):
            total -= row[i] - math.log(sum(math.exp(r) for r in row[i:]))
    assert plackett_luce(SCORES).item() == pytest.approx(total / 2)


def test_plackett_luce_probabilities_of_all_orders_add_up_to_one() -> None:
    orders = torch.stack([SCORES[0, list(order)] for order in itertools.permutations(range(3))])
    total = sum(math.exp(-plackett_luce(order.unsqueeze(0)).item()) for order in orders)
    assert total == pytest.approx(1.0)


def test_plackett_luce_gradient_is_that_of_successive_softmaxes() -> None:
    scores = SCORES[:1].clone().requires_grad_()
    plackett_luce(scores).backward()
    leaf = SCORES[0].clone().requires_grad_()
    torch.stack([F.cross_entropy(leaf[i:], torch.tensor(0)) for i in range(3)]).sum().backward()
    assert scores.grad is not None
    assert leaf.grad is not None
    assert torch.allclose(scores.grad[0], leaf.grad, atol=1e-6)


def test_all_pairs_closed_form() -> None:
    rows = [
        -sum(log_sigmoid(row[i] - row[j]) for i, j in itertools.combinations(range(3), 2)) / 3
        for row in SCORES.tolist()
    ]
    assert all_pairs(SCORES).item() == pytest.approx(sum(rows) / 2)


@RANKINGS
def test_two_answers_are_a_pair(loss: Loss) -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(9, 2, generator=draw)
    mine, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    one, other = loss(mine), pairwise(theirs[:, 0], theirs[:, 1])
    one.backward()
    other.backward()
    assert one.item() == pytest.approx(other.item(), abs=1e-6)
    assert mine.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-7)


def test_two_answers_with_a_margin_are_a_pair_with_a_margin() -> None:
    draw = torch.Generator().manual_seed(1)
    scores, margin = torch.randn(9, 2, generator=draw), torch.rand(9, generator=draw)
    expected = pairwise(scores[:, 0], scores[:, 1], margin)
    assert torch.isclose(all_pairs(scores, margin_B=margin), expected)


@RANKINGS
def test_a_constant_added_to_a_row_changes_nothing(loss: Loss) -> None:
    moved = SCORES + torch.tensor([[3.0], [-7.0]])
    assert loss(moved).item() == pytest.approx(loss(SCORES).item(), abs=1e-6)


@RANKINGS
@pytest.mark.parametrize("rubbish", [0.0, 50.0, float("nan"), float("inf")])
def test_missing_answers_have_no_influence_and_no_gradient(loss: Loss, rubbish: float) -> None:
    """A row of two beside a row of three is the mean of the two alone."""
    scores = SCORES.clone()
    scores[1, 2] = rubbish
    scores.requires_grad_()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    value = loss(scores, mask)
    assert value.item() == pytest.approx((loss(SCORES[:1]) + loss(SCORES[1:, :2])).item() / 2)
    value.backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[1, 2] == 0


@RANKINGS
def test_the_right_order_costs_less_than_the_wrong_one(loss: Loss) -> None:
    best_first = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert loss(best_first) < loss(torch.zeros(1, 4)) < loss(best_first.flip(1))


@pytest.mark.parametrize("loss", [all_pairs, plackett_luce, lambda s: pairwise(s[:, 0], s[:, 1])])
def test_gradients_agree_with_finite_differences(loss: Loss) -> None:
    """In float32, as the losses compute: steps of 1e-2, agreement to 1e-3."""
    scores = SCORES.float().requires_grad_()
    loss(scores).backward()
    assert scores.grad is not None
    for i, j in itertools.product(range(2), range(3)):
        step = torch.zeros(2, 3)
        step[i, j] = 1e-2
        slope = (loss(scores.detach() + step) - loss(scores.detach() - step)) / 2e-2
        assert slope.item() == pytest.approx(scores.grad[i, j].item(), abs=1e-3)


def test_classification_closed_form_and_smoothing() -> None:
    logits, label = SCORES.float(), torch.tensor([2, 0])
    log_p = logits.log_softmax(1)
    assert torch.isclose(classification(logits, label), -(log_p[0, 2] + log_p[1, 0]) / 2)
    smooth = classification(logits, label, label_smoothing=0.3)
    expected = 0.7 * -(log_p[0, 2] + log_p[1, 0]) / 2 + 0.3 * -log_p.mean()
    assert torch.isclose(smooth, expected)


def test_two_classes_are_a_pair_of_logits() -> None:
    """Classification with two classes is the pairwise loss of the right class's logit over the wrong one's."""
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    label = torch.tensor([1, 0])
    right, wrong = logits.gather(1, label[:, None])[:, 0], logits.gather(1, 1 - label[:, None])[:, 0]
    assert torch.isclose(classification(logits, label), pairwise(right, wrong))


def test_low_precision_scores_are_compared_in_float32() -> None:
    chosen = torch.tensor([100.0], dtype=torch.bfloat16)
    assert pairwise(chosen, chosen - 0.5).dtype == torch.float32


def test_pair_differences_lists_each_pair_that_is_there() -> None:
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert pair_differences(SCORES, mask).tolist() == pytest.approx([1.5, 0.75, -0.75, -2.0])
