"""A model that reads text and judges it, with its own tokenizer: opened from anywhere, asked in batches sorted by length.

N texts of a batch  T tokens
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import fsspec
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fmray.errors import ConfigError
from fmray.manifest import find_model_folder
from fmray.models.towers import locate_model
from fmray.rlhf.records import Rollouts
from fmray.rlhf.scoring import texts_to_score

KEY = "rewards.*.source"

Forward = Callable[[Tensor, Tensor, list[int]], Tensor]
"""Token ids and mask, int64 [N, T], and the texts' numbers in; a float per text, [N], out."""


class TextModel:
    """Model and tokenizer in float32 on a device, without dropout and gradients.

    `max_tokens` of a text are read, special tokens included; a longer one loses its beginning or its end (`cut`).
    """

    def __init__(
        self, auto: Any, source: str, device: torch.device, max_tokens: int, cut: Literal["left", "right"]
    ) -> None:
        with opened(source) as location:
            self.model, self.tokenizer = _load(auto, location, source)
        self.model.to(device).eval().requires_grad_(False)
        self.config = self.model.config
        self.config.use_cache = False
        self.tokenizer.truncation_side = cut
        self._device = device
        self._max_tokens = max_tokens
        if (limit := position_limit(self.model)) is not None and max_tokens > limit:
            raise ConfigError("rewards.*.max_tokens", max_tokens, f"{source} reads at most {limit} tokens")
        special = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None

    def texts(self, rollouts: Rollouts, what: Literal["response", "prompt_and_response"]) -> list[str]:
        """The samples as text, without this model's special tokens in the responses."""
        return texts_to_score(rollouts, what, self._special)

    def encode(self, texts: Sequence[Any], **options: Any) -> Any:
        """Token ids of each text, cut to the longest that is read."""
        return self.tokenizer(texts, truncation=True, max_length=self._max_tokens, **options)

    @property
    def pad_id(self) -> int | None:
        """What the model itself takes for padding; None where it knows none, and then reads one text at a time."""
        pad: int | None = getattr(self.config.get_text_config(), "pad_token_id", None)
        return pad

    @property
    def context_id(self) -> int | None:
        """The token that a text begins after: BOS, else EOS; None where the tokenizer has neither."""
        bos: int | None = self.tokenizer.bos_token_id
        eos: int | None = self.tokenizer.eos_token_id
        return eos if bos is None else bos

    @torch.inference_mode()
    def ask(
        self, rows: Sequence[Sequence[int]], forward: Forward, batch_size: int, max_cells: int | None = None
    ) -> list[float]:
        """`forward` over all texts, longest first, padded on the right; the answers in the texts' order.

        max_cells: tokens of a batch, padding included, where memory per token is what counts.
        """
        answers = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
        while order:
            longest = len(rows[order[0]])
            size = min(batch_size, max(1, max_cells // longest)) if max_cells else batch_size
            numbers, order = order[:size], order[size:]
            ids_NT = torch.full((len(numbers), longest), self.pad_id or 0)
            mask_NT = torch.zeros_like(ids_NT)
            for row, number in enumerate(numbers):
                ids_NT[row, : len(rows[number])] = torch.tensor(rows[number])
                mask_NT[row, : len(rows[number])] = 1
            said_N = forward(ids_NT.to(self._device), mask_NT.to(self._device), numbers)
            for number, answer in zip(numbers, said_N.float().tolist(), strict=True):
                answers[number] = answer
        return answers


def _load(auto: Any, location: str, source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    # a tagger reads words, which byte-level tokenizers refuse without this key; others ignore it
    options = {"add_prefix_space": True} if auto is AutoModelForTokenClassification else {}
    try:
        model, info = auto.from_pretrained(
            location, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        cure = "no network? use an asset: or a folder"
        raise ConfigError(KEY, source, f"cannot be loaded as a {_kind(auto)}: {reason} ({cure})") from None
    if missing := sorted(info["missing_keys"]):
        names = ", ".join(missing[:3])
        raise ConfigError(KEY, source, f"is no trained {_kind(auto)}: it lacks the weights {names}")
    return model, tokenizer


def _kind(auto: Any) -> str:
    """AutoModelForSequenceClassification → "sequence classification model"."""
    words = re.findall("[A-Z][a-z]+|[A-Z]+(?![a-z])", auto.__name__.removeprefix("AutoModelFor"))
    return f"{' '.join(words).lower()} model"


@contextmanager
def opened(source: str) -> Iterator[str]:
    """What `from_pretrained` takes, inside the `with`: an asset's, a model's or a run's folder (an URL's as a copy), a hub id."""
    if "://" in source:
        filesystem, path = fsspec.core.url_to_fs(find_model_folder(source))
        with tempfile.TemporaryDirectory() as local:
            filesystem.get(f"{str(path).rstrip('/')}/", f"{local}/", recursive=True)
            yield local
        return
    yield locate_model(source, KEY)


def position_limit(model: nn.Module) -> int | None:
    """Tokens that a model with learned positions can read; None where it has no such limit."""
    config: Any = model.config
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding id
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    return limit
