"""Rewards that are models: a classifier's label, a tagger's P(keep), a language model's likelihood.

N texts of a batch  T tokens  L labels  V vocabulary
"""

from __future__ import annotations

import difflib
import math
import re

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from fmray.config.rewards import ClassifierReward, GrammarReward, LikelihoodReward
from fmray.errors import ConfigError
from fmray.rlhf.records import Rollouts
from fmray.rlhf.scoring import RewardRole, Verdict
from fmray.rlhf.text_model import KEY, TextModel

MAX_LOGITS = 1 << 26
"""Logits of a language model at once: 256 MiB in float32."""


class ClassifierScorer(RewardRole):
    """A sequence classifier's score of one label.

    A reward model that fmray trained carries `fmray_gain` and `fmray_bias` in its config.json: with them its score (one output,
    or the margin of label 1 of two) has mean 0 and deviation 1 on reference texts (Ziegler et al. 2019, §2.1). That score is
    given as gain · score + bias; other outputs are given as they are.
    """

    def __init__(self, config: ClassifierReward, device: torch.device) -> None:
        auto = AutoModelForSequenceClassification
        self._reader = TextModel(auto, config.source, device, config.max_tokens, cut="left")
        self._config = config
        self._label = label_id(self._reader.config, config.label, config.source)
        self._gain, self._bias = normalisation(self._reader.config, self._label, config)
        self._one_eos = self._reader.config.eos_token_id if self._reader.config.is_encoder_decoder else None

    def judge(self, rollouts: Rollouts) -> list[Verdict]:
        reader = self._reader
        rows: list[list[int]] = reader.encode(reader.texts(rollouts, self._config.text))["input_ids"]
        if (eos := self._one_eos) is not None:  # T5 is read at its last EOS, and wants as many in each text
            rows = [[*(token for token in row if token != eos), eos] for row in rows]
        start = reader.context_id  # for a tokenizer that makes nothing of an empty text
        if start is not None:
            rows = [row or [start] for row in rows]
        known = [row for row in rows if row]
        size = self._config.batch_size if reader.pad_id is not None else 1
        scores = iter(reader.ask(known, self._forward, size))
        return [next(scores) if row else "its tokenizer makes no token of an empty text" for row in rows]

    def _forward(self, ids_NT: Tensor, mask_NT: Tensor, _: list[int]) -> Tensor:
        logits_NL = self._reader.model(input_ids=ids_NT, attention_mask=mask_NT).logits.float()
        many = self._reader.config.problem_type == "multi_label_classification"
        score_N = read_label(logits_NL, self._label, self._config.output, independent=many)
        return self._gain * score_N + self._bias


def read_label(logits_NL: Tensor, label: int, output: str, *, independent: bool = False) -> Tensor:
    """One label's score, float32 [N].

    `logit` z; `log_probability` log softmax(z); `probability` its exponential; `margin` z - logsumexp of the other logits, the
    log-odds. `independent`: labels that do not exclude each other, each a sigmoid: its log-odds are its logit. A single output
    is read as it is.
    """
    logit_N = logits_NL[:, label]
    if output == "logit" or logits_NL.shape[1] == 1:
        return logit_N
    if independent:
        margin_N = logit_N
    else:
        others = [other for other in range(logits_NL.shape[1]) if other != label]
        margin_N = logit_N - logits_NL[:, others].logsumexp(1)
    if output == "margin":
        return margin_N
    # of the log-odds: softmax of one against all others, without the cancellation near 1
    return F.logsigmoid(margin_N) if output == "log_probability" else torch.sigmoid(margin_N)


def label_id(config: PreTrainedConfig, label: str | int, source: str, key: str = "rewards.*.label") -> int:
    """A label's number by its name or number; ConfigError with the labels there are. 0 where there is one output."""
    if config.num_labels == 1:
        return 0
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    close = difflib.get_close_matches(str(label), names, n=1)
    near = f"did you mean {close[0]}? " if close else ""
    shown = ", ".join(f"{number} {name}" for number, name in list(enumerate(names))[:20])
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    raise ConfigError(key, label, f"{source} has no such label; {near}it has: {shown}{more}")


def normalisation(config: PreTrainedConfig, label: int, reward: ClassifierReward) -> tuple[float, float]:
    """Gain and bias of what a reward asks: the saved ones for the score they are of, turned for the other of two labels."""
    keys = config.to_dict()
    gain, bias = keys.get("fmray_gain", 1.0), keys.get("fmray_bias", 0.0)
    for name, value in (("fmray_gain", gain), ("fmray_bias", bias)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(KEY, reward.source, f"its config.json has {name}={value!r}, not a number")
    if config.num_labels == 1:
        return float(gain), float(bias)
    if config.num_labels != 2 or reward.output != "margin":
        return 1.0, 0.0
    return float(gain), float(bias if label == 1 else -bias)


# ------------------------------------------------------------------------------------------------------------------ tagger

WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*|[.!?]+|\S")
"""What a tagger gives a tag: numbers, words with their apostrophes, runs of sentence ends, other signs one by one."""


class GrammarScorer(RewardRole):
    """A grammar-edit tagger (GECToR, Omelianchuk et al. 2020): the mean over the words of P(keep this word as it is), or its log.

    The tag of a word is read at its first sub-word; [CLS] and [SEP] are no words, and words beyond `max_tokens` are not read.
    A text without words has the score of a tagger that knows nothing, 1 / number of tags (or its log): about the worst there
    is, so that silence is no way to be right.
    """

    def __init__(self, config: GrammarReward, device: torch.device) -> None:
        auto = AutoModelForTokenClassification
        self._reader = TextModel(auto, config.source, device, config.max_tokens, cut="right")
        self._config = config
        self._keep = label_id(self._reader.config, config.keep_label, config.source, "rewards.*.keep_label")
        tags = self._reader.config.num_labels
        self._nothing = 1 / tags if config.output == "probability" else -math.log(tags)

    def judge(self, rollouts: Rollouts) -> list[float]:
        texts = self._reader.texts(rollouts, self._config.text)
        scores = [self._nothing] * len(texts)
        words = {row: found for row, text in enumerate(texts) if (found := WORD.findall(text))}
        if not words:
            return scores
        encoded = self._reader.encode(list(words.values()), is_split_into_words=True)
        firsts = [first_subwords(encoded.word_ids(row)) for row in range(len(words))]

        def forward(ids_NT: Tensor, mask_NT: Tensor, numbers: list[int]) -> Tensor:
            logits_NTL = self._reader.model(input_ids=ids_NT, attention_mask=mask_NT).logits.float()
            keep_NT = logits_NTL.log_softmax(-1)[..., self._keep]
            if self._config.output == "probability":
                keep_NT = keep_NT.exp()
            means = [keep_NT[row, firsts[number]].mean() for row, number in enumerate(numbers)]
            return torch.stack(means)

        answers = self._reader.ask(encoded["input_ids"], forward, self._config.batch_size)
        for row, first, answer in zip(words, firsts, answers, strict=True):
            scores[row] = answer if first else self._nothing  # signs that the tokenizer drops
        return scores


def first_subwords(words: list[int | None]) -> list[int]:
    """The position of each word's first token, given the word of each token (None: a special token)."""
    return [
        place
        for place, word in enumerate(words)
        if word is not None and (place == 0 or words[place - 1] != word)
    ]


# ---------------------------------------------------------------------------------------------------------- language model


class LikelihoodScorer(RewardRole):
    """A causal language model's mean log-likelihood of a text's tokens.

    The first token is foreseen from BOS, or EOS where there is no BOS; where there is neither it is context only. A text
    without a token to foresee has the score of tokens drawn at random, -log V.
    """

    def __init__(self, config: LikelihoodReward, device: torch.device) -> None:
        self._reader = TextModel(AutoModelForCausalLM, config.source, device, config.max_tokens, cut="right")
        self._config = config
        self._vocabulary = int(self._reader.config.get_text_config().vocab_size)
        if not self._looks_back_only():
            raise ConfigError(
                KEY, config.source, "is no causal language model: its tokens see the ones that follow"
            )

    def judge(self, rollouts: Rollouts) -> list[float]:
        reader = self._reader
        texts = reader.texts(rollouts, self._config.text)
        start = [] if reader.context_id is None else [reader.context_id]
        encoded = reader.encode(texts, add_special_tokens=False)["input_ids"]
        rows = [(start + row)[: self._config.max_tokens] for row in encoded]
        told = [row for row in rows if len(row) > 1]
        cells = max(1, MAX_LOGITS // self._vocabulary)
        answers = iter(reader.ask(told, self._forward, self._config.batch_size, cells))
        return [next(answers) if len(row) > 1 else -math.log(self._vocabulary) for row in rows]

    @torch.inference_mode()
    def _looks_back_only(self) -> bool:
        ids_NT = torch.tensor([[1, 2, 3], [1, 2, 4]], device=self._reader.model.device) % self._vocabulary
        logits_NTV = self._reader.model(input_ids=ids_NT).logits[:, :2]
        # threads may round a product otherwise: far below what another token ahead would change
        return torch.allclose(logits_NTV[0], logits_NTV[1], atol=1e-2, rtol=1e-3)

    def _forward(self, ids_NT: Tensor, mask_NT: Tensor, _: list[int]) -> Tensor:
        logits_NTV = self._reader.model(input_ids=ids_NT, attention_mask=mask_NT).logits[:, :-1].float()
        loss_NT = F.cross_entropy(logits_NTV.transpose(1, 2), ids_NT[:, 1:], reduction="none")
        real_NT = mask_NT[:, 1:]
        return -(loss_NT * real_NT).sum(1) / real_NT.sum(1)
