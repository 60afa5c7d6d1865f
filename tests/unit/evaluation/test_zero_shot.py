"""Zero-shot classification in closed form, and on several ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.errors import DataError
from fmray.evaluation.retrieval import own_share
from fmray.evaluation.zero_shot import (
    ZeroShot,
    class_embeddings,
    classify,
    confusion_matrix,
    evaluate_zero_shot,
)
from tests.unit.evaluation.contexts import context
from tests.workers import run_workers

VECTORS = {"a cat": [1.0, 0.0], "cat!": [0.0, 2.0], "a {}": [0.6, 0.8], "{}!": [0.6, 0.8]}


def encode(sentences: list[str]) -> Tensor:
    return torch.tensor([VECTORS[sentence] for sentence in sentences])


def test_class_embedding_is_the_normalised_mean_of_normalised_templates() -> None:
    # a class called "{}" must not be taken for a place in the template
    class_CD = class_embeddings(encode, ["cat", "{}"], ["a {}", "{}!"])
    assert class_CD == pytest.approx(torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))


def test_probabilities_are_a_softmax_of_scaled_cosines() -> None:
    probabilities = classify(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]]), scale=10)
    assert probabilities[0, 1] / probabilities[0, 0] == pytest.approx(2.718281828**-4)
    assert probabilities.sum().item() == pytest.approx(1)


def test_confusion_counts_true_class_in_rows() -> None:
    matrix = confusion_matrix(torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 2, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]


def test_accuracy_in_closed_form() -> None:
    """Ten classes on a line of angles; pictures at a class's angle, shifted by 0, 1, 4 and 5 classes."""
    angle = torch.arange(10) * 0.1
    class_CD = torch.stack([angle.cos(), angle.sin()], dim=1)
    label = torch.tensor([0, 0, 0, 0])
    result = evaluate_zero_shot(class_CD[[0, 1, 2, 5]], label, class_CD, context())
    # seen from class k, class 0 comes after the k between them and at most k on the other side
    assert result.metrics == {"eval/zero_shot/top1": 0.25, "eval/zero_shot/top5": 0.75}
    assert result.confusion_CC[0].tolist() == [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]


def test_labels_outside_the_classes_and_nothing_to_classify_are_errors() -> None:
    with pytest.raises(DataError, match="1 labels are not among the 2 classes"):
        evaluate_zero_shot(torch.eye(2), torch.tensor([0, 2]), torch.eye(2), context())
    with pytest.raises(DataError, match="no picture"):
        evaluate_zero_shot(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.eye(2), context())
    bad = torch.tensor([[float("nan"), 1.0]])
    with pytest.raises(DataError, match="1 embeddings are not finite"):
        evaluate_zero_shot(bad, torch.tensor([0]), torch.eye(2), context())


def zero_shot_on_rank(rank: int, world_size: int, sizes: list[int]) -> list[ZeroShot]:
    where, results = context(rank, world_size), []
    for size in sizes:
        random = torch.Generator().manual_seed(size)
        class_CD = F.normalize(torch.randn(7, 12, generator=random), dim=1)
        label = torch.randint(0, 7, (size,), generator=random)
        image = F.normalize(class_CD[label] + 0.5 * torch.randn(size, 12, generator=random), dim=1)
        results.append(evaluate_zero_shot(own_share(image, where), own_share(label, where), class_CD, where))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_numbers_of_one(world_size: int) -> None:
    sizes = [1, 5, 64, 100]
    alone = zero_shot_on_rank(0, 1, sizes)
    assert 0 < alone[-1].metrics["eval/zero_shot/top1"] < 1
    assert alone[-1].confusion_CC.sum() == 100
    for results in run_workers(world_size, zero_shot_on_rank, sizes):
        for one, several in zip(alone, results, strict=True):
            assert one.metrics == several.metrics
            assert torch.equal(one.confusion_CC, several.confusion_CC)
