"""Judges of sentiment: counted words in closed form, a logistic regression at its optimum, a probe that padding does not move."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fmray.evaluation.sentiment_judges import (
    SentenceEncoder,
    SentenceProbe,
    WordCounts,
    accuracy,
    fit_logistic,
    words_and_pairs,
)
from tests.stories import tiny_encoder

CPU = torch.device("cpu")
GOOD = ["good fun", "so good", "good", "fun and good"]
BAD = ["bad", "so bad", "no fun", "bad and long"]
TEXTS, LABELS = [*GOOD, *BAD], [True] * 4 + [False] * 4


def test_features_are_words_and_neighbours_each_once() -> None:
    assert words_and_pairs("Not GOOD, not good!") == {
        "not",
        "good",
        "!",
        "not good",
        "good not",
        "good !",
    }
    assert words_and_pairs("it's") == {"it's"}
    assert words_and_pairs("") == set()


def test_counts_are_naive_bayes_with_one_added() -> None:
    counts = WordCounts.of(TEXTS, LABELS, least=2)
    # features of at least two texts: good 4/0, fun 2/1, so 1/1, bad 0/3, and 1/1
    assert set(counts.ratios) == {"good", "fun", "so", "bad", "and"}
    good, bad = 5 + 3 + 2 + 1 + 2, 1 + 2 + 2 + 4 + 2
    assert counts.ratios["good"] == pytest.approx(math.log(5 / good) - math.log(1 / bad))
    assert counts.ratios["fun"] == pytest.approx(math.log(3 / good) - math.log(2 / bad))
    expected = [counts.ratios["good"], (counts.ratios["good"] + counts.ratios["fun"]) / 2, 0.0]
    found = counts.log_odds(["GOOD", "fun, good, unheard of", "nothing known"])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert accuracy(counts, TEXTS, LABELS) == 7 / 8  # "no fun" looks like fun to counts of single words


def test_a_longer_text_is_not_surer() -> None:
    counts = WordCounts.of(TEXTS, LABELS, least=2)
    short, long = counts.log_odds(["good fun", " ".join(["good fun"] * 20)])
    assert long == short


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    feature_ND = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    noise_N = torch.randn(200, generator=generator, dtype=torch.float64)
    return feature_ND, (2 * feature_ND[:, 0] - feature_ND[:, 1] + noise_N > 0.5).double()


def test_the_regression_is_at_its_minimum() -> None:
    feature_ND, label_N = features()
    weight_D, bias = fit_logistic(feature_ND, label_N, l2=0.05)
    std_D = feature_ND.std(0, correction=0)
    wrong_N = (feature_ND @ weight_D + bias).sigmoid() - label_N
    slope_D = (feature_ND - feature_ND.mean(0)).T @ wrong_N / 200 / std_D + 0.05 * weight_D * std_D
    assert slope_D.abs().max() < 1e-7
    assert abs(float(wrong_N.mean())) < 1e-7
    assert weight_D[0] > -weight_D[1] > 0


def test_units_and_constants_do_not_matter_to_the_regression() -> None:
    feature_ND, label_N = features()
    weight_D, bias = fit_logistic(feature_ND, label_N)
    constant_N1 = torch.full((200, 1), 3.0, dtype=torch.float64)
    other_ND = torch.cat([feature_ND * 1000 + 7, constant_N1], dim=1)
    other_D, other_bias = fit_logistic(other_ND, label_N)
    assert other_D[-1] == 0
    torch.testing.assert_close(other_ND @ other_D + other_bias, feature_ND @ weight_D + bias)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with tokenizer."""
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def test_embeddings_are_unit_vectors_whatever_stands_beside_them(encoder: Path) -> None:
    texts = ["the dog likes the sea", "a cat", "", "our teacher remembers a long story"]
    embedded_ND = SentenceEncoder(str(encoder), CPU).embed(texts)
    assert embedded_ND.dtype == torch.float64
    torch.testing.assert_close(embedded_ND.norm(dim=1), torch.ones(4, dtype=torch.float64))
    one_by_one = torch.cat([SentenceEncoder(str(encoder), CPU).embed([text]) for text in texts])
    torch.testing.assert_close(embedded_ND, one_by_one, atol=1e-6, rtol=0)


def test_a_probe_tells_apart_what_the_encoder_does(encoder: Path) -> None:
    texts = [f"{who} {verb} it" for who in ("the dog", "a cat", "that king") for verb in ("likes", "hates")]
    probe = SentenceProbe.of(str(encoder), CPU, texts, [True, False] * 3)
    assert accuracy(probe, ["our teacher likes it", "our teacher hates it"], [True, False]) == 1.0
    assert "logistic regression" in probe.detail


def test_log_loss_falls_below_chance() -> None:
    feature_ND, label_N = features()
    weight_D, bias = fit_logistic(feature_ND, label_N)
    assert F.binary_cross_entropy_with_logits(feature_ND @ weight_D + bias, label_N) < 0.5
