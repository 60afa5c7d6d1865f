"""Accuracy and calibration by hand, and the same on any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fmray.config.loading import validate
from fmray.config.reward import RewardModelConfig
from fmray.data.verdicts import Verdict, open_verdicts
from fmray.evaluation.calibration import brier_score, by_confidence, expected_calibration_error
from fmray.evaluation.verdicts import evaluate_verdicts, judge_labels, judge_orders, score_tokens
from fmray.models.reward_model import build_reward_model
from tests.opinions import opinion_run
from tests.unit.evaluation.contexts import context
from tests.workers import run_workers


def test_calibration_by_hand() -> None:
    confidence = torch.tensor([0.55, 0.6, 0.72, 0.95, 1.0])
    right = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5])
    bins = by_confidence(confidence, right, 2, lowest=0.5)
    assert [(b.low, b.high, b.count) for b in bins] == [(0.5, 0.75, 3), (0.75, 1.0, 2)]
    assert bins[0].accuracy == pytest.approx(2 / 3)
    assert bins[0].confidence == pytest.approx((0.55 + 0.6 + 0.72) / 3)
    expected = 3 / 5 * abs(2 / 3 - 1.87 / 3) + 2 / 5 * abs(0.75 - 0.975)
    assert expected_calibration_error(bins) == pytest.approx(expected)


def test_empty_bins_are_left_out_and_the_edges_belong_somewhere() -> None:
    bins = by_confidence(torch.tensor([0.5, 1.0]), torch.ones(2), 10, lowest=0.5)
    assert [b.count for b in bins] == [1, 1]
    assert (bins[0].low, bins[-1].high) == (0.5, 1.0)


def test_brier_score_of_knowing_guessing_and_being_wrong() -> None:
    outcome = torch.tensor([0, 1])
    assert brier_score(torch.eye(2), outcome) == 0.0
    assert brier_score(torch.full((2, 2), 0.5), outcome) == 0.5
    assert brier_score(torch.eye(2).flip(0), outcome) == 2.0


def test_labels_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0], [0.0, math.log(9)]])
    verdicts = [Verdict(("a",), label=label) for label in (1, 1, 1)]
    found = judge_labels(logits, verdicts, [([1],)] * 3, 10).metrics
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["commonest_label"] == 1.0
    assert found["log_loss"] == pytest.approx(-(math.log(0.75) + math.log(0.2) + math.log(0.9)) / 3)
    assert found["brier"] == pytest.approx(2 * (0.25**2 + 0.8**2 + 0.1**2) / 3)


def test_orders_by_hand_with_a_tie_and_the_baseline_of_length() -> None:
    verdicts = [Verdict(("a", "b")), Verdict(("c", "d", "e"))]
    rows = [([1, 1], [1]), ([1], [1, 1], [1, 1, 1])]
    found = judge_orders(torch.tensor([[1.0], [1.0], [2.0], [0.0], [1.0]]), verdicts, rows, 10).metrics
    # a tie; c > d, c > e, d < e
    assert found["accuracy"] == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    assert found["best_first"] == pytest.approx(0.5)
    assert found["mean_lead"] == pytest.approx((0 + 2 + 1 - 1) / 4)
    assert found["by_length_alone"] == pytest.approx(
        3 / 4
    )  # "the shorter is better" is right but for the first
    log_losses = [math.log1p(math.exp(-lead)) for lead in (0, 2, 1, -1)]
    assert found["log_loss"] == pytest.approx(sum(log_losses) / 4)


def on_a_rank(rank: int, world: int, folder: str) -> tuple[torch.Tensor, dict[str, float]]:
    config = validate(RewardModelConfig, opinion_run(Path(folder)))
    torch.manual_seed(0)
    verdicts = open_verdicts(config.data)
    scorer = build_reward_model(config.model, verdicts.labels)
    here = context(rank, world)
    texts = scorer.tokenize([verdict.texts[0] for verdict in verdicts.train])
    metrics, _ = evaluate_verdicts(scorer, verdicts.held_out, config.evaluate, here)
    return score_tokens(scorer, texts, 8, here), metrics


def test_scores_stand_in_the_order_of_the_texts(tmp_path: Path) -> None:
    together, _ = on_a_rank(0, 1, str(tmp_path))
    config = validate(RewardModelConfig, opinion_run(tmp_path))
    torch.manual_seed(0)
    verdicts = open_verdicts(config.data)
    scorer = build_reward_model(config.model, verdicts.labels)
    for index in (0, 7, 20):
        alone = score_tokens(scorer, scorer.tokenize(list(verdicts.train[index].texts)), 1, context())
        assert torch.allclose(alone[0], together[index], atol=1e-5)


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    scores, metrics = on_a_rank(0, 1, str(tmp_path))
    for found, told in run_workers(2, on_a_rank, str(tmp_path)):
        assert torch.allclose(found, scores, atol=1e-5)
        assert told == pytest.approx(metrics, abs=1e-5)
