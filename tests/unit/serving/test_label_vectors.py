from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fmray.errors import RequestError
from fmray.serving.asks import TextAsk
from fmray.serving.batcher import Answered
from fmray.serving.clip_engine import Embedding, EmbeddingCapabilities
from fmray.serving.zero_shot import LabelVectors, check_labels, probabilities

SOFTMAX = EmbeddingCapabilities(
    kind="clip",
    modalities=("text", "image"),
    output="embedding",
    max_tokens=77,
    image_size=224,
    dim=4,
    logit_scale=10.0,
    logit_bias=None,
)
SIGMOID = replace(SOFTMAX, logit_bias=-2.0)


def unit(text: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(sum(text.encode()))
    return F.normalize(torch.randn(4, generator=draw), dim=0)


class Answers:
    """Embeds a text as `unit(text)` and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, asks: Sequence[TextAsk]) -> Answered[Embedding]:
        self.asked += [ask.text for ask in asks]
        return Answered([Embedding(unit(ask.text), tokens=1, truncated=False) for ask in asks], 0.0, 0.0)


def test_an_ensemble_is_the_normalised_mean() -> None:
    templates = ["a {}", "the {} of {}"]
    vectors = asyncio.run(LabelVectors(Answers()).of(["cat", "dog"], templates))
    for label, vector in zip(["cat", "dog"], vectors, strict=True):
        expected = F.normalize(unit(f"a {label}") + unit(f"the {label} of {label}"), dim=0)
        torch.testing.assert_close(vector.vector_D, expected)
        assert vector.tokens == 2


def test_known_labels_are_not_embedded_again() -> None:
    answers = Answers()
    labels = LabelVectors(answers, capacity=3)
    first = asyncio.run(labels.of(["a", "b"], ["{}"]))
    again = asyncio.run(labels.of(["b", "c", "a"], ["{}"]))
    assert answers.asked == ["a", "b", "c"]
    assert again[2] is first[0]
    asyncio.run(
        labels.of(["a"], ["the {}"])
    )  # another template is another vector; b, the oldest, is forgotten
    asyncio.run(labels.of(["c", "a", "b"], ["{}"]))
    assert answers.asked == ["a", "b", "c", "the a", "b"]


def test_a_request_larger_than_the_cache_is_answered() -> None:
    assert len(asyncio.run(LabelVectors(Answers(), capacity=2).of([str(i) for i in range(9)], ["{}"]))) == 9


def test_templates_are_not_format_strings() -> None:
    answers = Answers()
    asyncio.run(LabelVectors(answers).of(["cat"], ["{} {0.__class__} {{}}"]))
    assert answers.asked == ["cat {0.__class__} {cat}"]


def test_probabilities_against_closed_forms() -> None:
    image_ND = torch.stack([unit("x"), unit("y"), unit("z")])
    label_LD, neutral_D = torch.stack([unit("cat"), unit("dog")]), unit("thing")
    cosine_NL = image_ND @ label_LD.T
    torch.testing.assert_close(
        probabilities(image_ND, label_LD, None, SOFTMAX), (10 * cosine_NL).softmax(dim=1)
    )
    torch.testing.assert_close(
        probabilities(image_ND, label_LD, None, SIGMOID), (10 * cosine_NL - 2).softmax(dim=1)
    )
    torch.testing.assert_close(
        probabilities(image_ND, label_LD, neutral_D, SIGMOID), (10 * cosine_NL - 2).sigmoid()
    )
    alone_NL = probabilities(image_ND, label_LD, neutral_D, SOFTMAX)
    for column in range(2):  # the same as a softmax between the label and the neutral one
        pair_2D = torch.stack([label_LD[column], neutral_D])
        torch.testing.assert_close(alone_NL[:, column], probabilities(image_ND, pair_2D, None, SOFTMAX)[:, 0])


@pytest.mark.parametrize(
    ("labels", "templates", "code", "param"),
    [
        ([], ["{}"], "empty_input", "labels"),
        (["a", " "], ["{}"], "empty_input", "labels[1]"),
        (["a", "b", "a"], ["{}"], "invalid_value", "labels[2]"),
        ([str(i) for i in range(11)], ["{}"], "too_many_inputs", "labels"),
        (["a" * 1001], ["{}"], "context_length_exceeded", "labels[0]"),
        (["a"], [], "invalid_value", "template"),
        (["a"], ["no place"], "invalid_value", "template"),
        (["a"], ["{}", "no place"], "invalid_value", "template[1]"),
        (["a"], ["{}" * 501], "context_length_exceeded", "template"),
        (["a"], ["{}"] * 101, "invalid_value", "template"),
    ],
)
def test_unusable_labels_are_named(labels: list[str], templates: list[str], code: str, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_labels(labels, templates, max_labels=10)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


def test_too_many_sentences_are_refused() -> None:
    labels = [str(i) for i in range(1000)]
    check_labels(labels, ["{}"] * 20, max_labels=1000)
    with pytest.raises(RequestError, match="20000 sentences"):
        check_labels(labels, ["{}"] * 21, max_labels=1000)


def test_what_was_known_is_counted() -> None:
    told: list[tuple[int, int]] = []
    labels = LabelVectors(Answers(), count=lambda hits, misses: told.append((hits, misses)))
    for asked in (["a", "b"], ["b", "c", "a"], ["a"]):
        asyncio.run(labels.of(asked, ["{}"]))
    assert told == [(0, 2), (2, 1), (1, 0)]
