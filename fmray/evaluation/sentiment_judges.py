"""Two judges of sentiment that share nothing with a reward model: counted words, and a probe of a frozen sentence encoder.

N texts  D width of an embedding
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fmray.config.schema import TowerConfig
from fmray.models.towers import default_pooling, load_tokenizer, pool, pretrained_tower, tower_config

WORD = re.compile(r"\w+(?:['’]\w+)*|[.!?]")


class SentimentJudge(Protocol):
    """Says how positive a text is."""

    @property
    def name(self) -> str:
        """Two words for people."""
        ...

    @property
    def detail(self) -> str:
        """What it is, for people."""
        ...

    def log_odds(self, texts: Sequence[str]) -> Tensor:
        """float64 [N]; above 0: rather positive."""
        ...


def accuracy(judge: SentimentJudge, texts: Sequence[str], labels: Sequence[bool]) -> float:
    """Share of texts whose log-odds have the label's sign, 0..1; 0 counts as negative."""
    right_N = (judge.log_odds(texts) > 0) == torch.tensor(labels)
    return float(right_N.double().mean())


# -------------------------------------------------------------------------------------------------------- counted words


def words_and_pairs(text: str) -> set[str]:
    """`{"not", "good", "not good"}`: a text's words, case folded, and its neighbouring pairs, each once."""
    words = WORD.findall(text.casefold())
    return {*words, *(f"{a} {b}" for a, b in pairwise(words))}


@dataclass(frozen=True, slots=True)
class WordCounts:
    """Naive Bayes over the words and word pairs that a text has (Wang and Manning 2012, §2.1: binarised, α = 1).

    The log-odds are the mean over a text's known features, not their sum, so that a longer text is not a surer one.
    """

    ratios: dict[str, float]
    """Feature → log of how much commoner it is in positive texts."""
    name: str = "counted words"
    detail: str = "log-odds of naive Bayes over a text's words and word pairs, their mean"

    @classmethod
    def of(cls, texts: Sequence[str], labels: Sequence[bool], least: int = 3) -> WordCounts:
        """Features that at least so many of the texts have."""
        found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        for text, label in zip(texts, labels, strict=True):
            found[bool(label)].update(words_and_pairs(text))
        good, bad = found[True], found[False]
        known = [name for name in {**good, **bad} if good[name] + bad[name] >= least]
        all_good, all_bad = (sum(counts[name] + 1 for name in known) for counts in (good, bad))
        ratios = {
            name: math.log((good[name] + 1) / all_good) - math.log((bad[name] + 1) / all_bad)
            for name in known
        }
        return cls(ratios)

    def log_odds(self, texts: Sequence[str]) -> Tensor:
        odds = []
        for text in texts:
            known = [self.ratios[name] for name in sorted(words_and_pairs(text)) if name in self.ratios]
            odds.append(sum(known) / len(known) if known else 0.0)
        return torch.tensor(odds, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ a sentence probe


class SentenceEncoder:
    """A frozen text tower with its own pooling: texts to unit vectors."""

    def __init__(self, source: str, device: torch.device, max_tokens: int = 64) -> None:
        tower, key = TowerConfig(source=source), "second.encoder"
        config = tower_config(tower, key, None)
        self._model: PreTrainedModel = pretrained_tower(tower, config, key).to(device).eval()
        self._tokenizer: PreTrainedTokenizerFast = load_tokenizer(tower, key)
        self._pooling = default_pooling(config)
        self._device, self._max_tokens = device, max_tokens

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """float64 [N, D] on the CPU; texts of like length are read together."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        parts = []
        for start in range(0, len(order), batch_size):
            chosen = [texts[index] for index in order[start : start + batch_size]]
            encoded = self._tokenizer(
                chosen, truncation=True, max_length=self._max_tokens, padding=True, return_tensors="pt"
            ).to(self._device)
            outputs = self._model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
            parts.append(pool(outputs, self._pooling, encoded["attention_mask"]).cpu())
        embedded_ND = F.normalize(torch.cat(parts).double(), dim=-1)
        return embedded_ND[torch.tensor(order).argsort()]


@dataclass(frozen=True, slots=True)
class SentenceProbe:
    """A logistic regression on a frozen encoder's embeddings."""

    encoder: SentenceEncoder
    weight_D: Tensor
    bias: float
    detail: str
    name: str = "sentence probe"

    @classmethod
    def of(
        cls, source: str, device: torch.device, texts: Sequence[str], labels: Sequence[bool]
    ) -> SentenceProbe:
        """Fitted to labelled texts. Raises ConfigError where the encoder cannot be loaded."""
        encoder = SentenceEncoder(source, device)
        weight_D, bias = fit_logistic(encoder.embed(texts), torch.tensor(labels, dtype=torch.float64))
        return cls(
            encoder,
            weight_D,
            bias,
            f"log-odds of a logistic regression on frozen {source.removeprefix('asset:')}",
        )

    def log_odds(self, texts: Sequence[str]) -> Tensor:
        return self.encoder.embed(texts) @ self.weight_D + self.bias


def fit_logistic(feature_ND: Tensor, label_N: Tensor, l2: float = 0.1) -> tuple[Tensor, float]:
    """Weights [D] and bias that minimise the mean log-loss + l2/2 · |w|² of standardised features; float64, deterministic.

    The weights are for the features as they are; one that never changes gets none. L-BFGS (Liu and Nocedal 1989).
    """
    mean_D, std_D = feature_ND.mean(0), feature_ND.std(0, correction=0)
    scale_D = torch.where(std_D > 1e-12, 1 / std_D, 0.0)
    standard_ND = (feature_ND - mean_D) * scale_D
    weight_D = torch.zeros_like(mean_D, requires_grad=True)
    bias = torch.zeros((), dtype=mean_D.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_D, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(standard_ND @ weight_D + bias, label_N)
        value = value + l2 / 2 * weight_D.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    raw_D = (weight_D * scale_D).detach()
    return raw_D, float(bias.detach() - raw_D @ mean_D)
