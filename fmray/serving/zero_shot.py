"""Zero-shot classification: labels to unit vectors, remembered; pictures to probabilities of labels.

N pictures  L labels  P templates  D width of the shared space
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.errors import RequestError
from fmray.serving.asks import TextAsk, checked_text
from fmray.serving.batcher import Answered
from fmray.serving.clip_engine import Embedding, EmbeddingCapabilities

MAX_LABEL_CHARACTERS = 1000
"""Characters of a label or a template."""
MAX_TEMPLATES = 100
MAX_SENTENCES = 20_000
"""Labels times templates of one request."""
NEUTRAL = "thing"
"""The label that every picture fits."""

Answer = Callable[[Sequence[TextAsk]], Awaitable[Answered[Embedding]]]
Count = Callable[[int, int], None]
"""Told how many labels of a request were known, and how many were not."""


def check_labels(labels: Sequence[str], templates: Sequence[str], *, max_labels: int) -> None:
    """Raises RequestError(400) that names the label or template that cannot be used."""
    if not labels:
        raise RequestError(400, "empty_input", "labels is empty", "labels")
    if len(labels) > max_labels:
        raise RequestError(400, "too_many_inputs", f"labels has more than {max_labels} items", "labels")
    if not 0 < len(templates) <= MAX_TEMPLATES:
        raise RequestError(400, "invalid_value", f"template: give 1 to {MAX_TEMPLATES} of them", "template")
    if len(labels) * len(templates) > MAX_SENTENCES:
        message = f"labels times templates are more than {MAX_SENTENCES} sentences"
        raise RequestError(400, "too_many_inputs", message, "labels")
    seen: set[str] = set()
    for position, label in enumerate(labels):
        name = f"labels[{position}]"
        _check_length(checked_text(label, name), name)
        if label in seen:
            raise RequestError(400, "invalid_value", f"{name} stands in labels twice", name)
        seen.add(label)
    for position, template in enumerate(templates):
        name = "template" if len(templates) == 1 else f"template[{position}]"
        _check_length(template, name)
        if "{}" not in template:
            raise RequestError(400, "invalid_value", f"{name} has no {{}} for the label to stand in", name)


def _check_length(text: str, name: str) -> None:
    if len(text) > MAX_LABEL_CHARACTERS:
        message = f"{name} has more than {MAX_LABEL_CHARACTERS} characters"
        raise RequestError(400, "context_length_exceeded", message, name)


class LabelVectors:
    """Unit vectors of labels; the least recently used is forgotten first. For one event loop: no lock."""

    def __init__(self, answer: Answer, capacity: int = 8192, count: Count | None = None) -> None:
        self._answer, self._capacity, self._count = answer, capacity, count
        self._known: OrderedDict[bytes, Embedding] = OrderedDict()

    async def of(self, labels: Sequence[str], templates: Sequence[str]) -> list[Embedding]:
        """One embedding per label: the mean of its sentences' unit vectors, normalised (CLIP, §3.1.4)."""
        # a digest as the key: what strangers send does not stay in memory
        keys = [hashlib.sha256(json.dumps([label, *templates]).encode()).digest() for label in labels]
        found = {key: self._known[key] for key in keys if key in self._known}
        missing = [(key, label) for key, label in zip(keys, labels, strict=True) if key not in found]
        if self._count is not None:
            self._count(len(labels) - len(missing), len(missing))
        sentences = [
            # replace, not format: a template is a stranger's
            TextAsk(template.replace("{}", label), name="labels")
            for _, label in missing
            for template in templates
        ]
        embedded = (await self._answer(sentences)).replies if sentences else []
        for position, (key, _) in enumerate(missing):
            found[key] = _mean(embedded[position * len(templates) : (position + 1) * len(templates)])
        for key in keys:
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return [found[key] for key in keys]


def _mean(embedded: Sequence[Embedding]) -> Embedding:
    mean_D = torch.stack([one.vector_D for one in embedded]).mean(dim=0)
    tokens, truncated = sum(one.tokens for one in embedded), any(one.truncated for one in embedded)
    return Embedding(F.normalize(mean_D, dim=0), tokens, truncated)


def probabilities(
    image_ND: Tensor, label_LD: Tensor, neutral_D: Tensor | None, capabilities: EmbeddingCapabilities
) -> Tensor:
    """Float32 [N, L]. Without a neutral vector, rows sum to 1; with one, each label stands by itself.

    A model trained with a sigmoid per pair says by itself how likely a pair is. A softmax-trained one only
    ranks: there a label is weighed against the neutral one alone, sigmoid(logit - neutral logit).
    """
    logits_NL = capabilities.logit_scale * image_ND @ label_LD.T
    if neutral_D is None:
        return logits_NL.softmax(dim=1)
    if capabilities.logit_bias is not None:
        return (logits_NL + capabilities.logit_bias).sigmoid()
    return (logits_NL - capabilities.logit_scale * (image_ND @ neutral_D)[:, None]).sigmoid()
