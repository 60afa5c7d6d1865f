"""Text models with a score or one logit per label: built, asked, saved so that `AutoModelForSequenceClassification` loads them.

An encoder is read as its class in transformers does it (BERT: first token). An encoder-decoder (T5) reads the text in its
encoder and again in its decoder, and is scored from the decoder's state at the last end-of-sequence token: the one reading
that transformers' own class offers, at the price of a decoder as long as the text. A decoder-only model is scored at its last
real token.

N texts  T tokens  C labels (1: a score)  D width
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from fmray.config.reward import RewardModelSection
from fmray.config.schema import TowerConfig
from fmray.errors import CheckpointError, ConfigError
from fmray.manifest import find_model_folder
from fmray.models.freezing import ParameterGroup, grouped
from fmray.models.towers import load_tokenizer, locate, locate_model, tower_config

SCORE_NAME = "reward"
"""The label of a model with one output."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model and what prepares its texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    max_tokens: int

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of the outputs."""
        named = self.model.config.id2label
        return tuple(named[index] for index in range(len(named)))

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; longer ones lose their beginning."""
        rows = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        eos = self.model.config.eos_token_id
        if not self.model.config.is_encoder_decoder:
            return [list(row) for row in rows]
        # transformers finds the state to read by the end-of-sequence id, so a text that spells one must not hold it
        return [[token for token in row[:-1] if token != eos] + [eos] for row in rows]

    def logits(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Float32 logits [N, C] of texts padded on either side, int64 [N, T]; which side and how much changes nothing."""
        ids_NT, mask_NT = padding_to_the_right(ids_NT, mask_NT)
        logits: Tensor = self.model(input_ids=ids_NT, attention_mask=mask_NT).logits
        return logits.float()


def model_config(section: RewardModelSection, labels: tuple[str, ...]) -> PreTrainedConfig:
    """The transformers configuration with the user's changes and labels; raises ConfigError."""
    location = _location(section.source)
    tower = TowerConfig(source=location, pretrained=section.pretrained, overrides=section.overrides)
    config = tower_config(tower, "model", None)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        cure = f"transformers has no sequence classification for {config.model_type}; take a text model such as asset:minilm"
        raise ConfigError("model.source", section.source, cure)
    if section.dropout is not None:
        for name, value in list(vars(config).items()):
            numeric = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            if "drop" in name and numeric:
                setattr(config, name, section.dropout)
    names = labels or (SCORE_NAME,)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "single_label_classification" if labels else None
    config.fmray_max_tokens = section.max_tokens
    for name in ("fmray_gain", "fmray_bias"):  # of the model it starts from
        if hasattr(config, name):
            delattr(config, name)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < section.max_tokens:
        raise ConfigError(
            "model.max_tokens", section.max_tokens, f"{config.model_type} has {positions} positions"
        )
    return config


def is_decoder_only(config: PreTrainedConfig) -> bool:
    """GPT-2, Llama and their like: they write text and cannot fill a gap in it."""
    writes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    return writes and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def build_reward_model(section: RewardModelSection, labels: tuple[str, ...]) -> Scorer:
    """A model to train, float32: the source's body under a head for the labels, or for one score where there are none.

    A new scoring head is drawn from N(0, 1/(D + 1)) with bias 0 (Stiennon et al. 2020; Huang et al. 2024, detail 5), by torch's
    global generator; a head of the same size that the source brings is kept. Raises ConfigError.
    """
    config = model_config(section, labels)
    tokenizer = _tokenizer(section)
    config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.eos_token_id is not None:
        config.eos_token_id = tokenizer.eos_token_id
    if len(tokenizer) > config.vocab_size:
        vocabulary = f"its tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}"
        raise ConfigError("model.tokenizer", section.tokenizer or section.source, vocabulary)
    if section.pretrained:
        model, fresh = _pretrained(section, config)
    else:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        fresh = {name for name, _ in model.named_parameters()}
    if not labels:
        _start_score_head(model, fresh)
    return Scorer(model, tokenizer, section.max_tokens)


def _location(source: str) -> str:
    return source if source.startswith("arch:") else locate_model(source, "model.source")


def _tokenizer(section: RewardModelSection) -> PreTrainedTokenizerFast:
    """Padding on the right, truncation on the left: what a reply ends with must stay."""
    source = section.tokenizer or section.source
    if source.startswith("arch:"):
        raise ConfigError(
            "model.tokenizer", None, f"{section.source} brings none: name one, such as asset:minilm"
        )
    location = locate(source, "model.tokenizer")
    if not Path(location, "tokenizer_config.json").is_file():
        location = _location(source)
    tokenizer = load_tokenizer(TowerConfig(source=location), "model.tokenizer")
    tokenizer.truncation_side = "left"
    if tokenizer.pad_token is None:
        raise ConfigError("model.tokenizer", source, "it has neither a padding nor an end-of-sequence token")
    return tokenizer


def _pretrained(section: RewardModelSection, config: PreTrainedConfig) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of parameters that its source did not hold (or held for other labels)."""
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            _location(section.source),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("model.source", section.source, f"cannot be loaded: {reason}") from None
    fresh = {
        *info["missing_keys"],
        *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]),
    }
    lost = sorted(name for name in fresh if not is_head(model, name))
    if lost:
        raise ConfigError(
            "model.source", section.source, f"does not hold the body's weights: {', '.join(lost[:3])}"
        )
    return model, fresh


def is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter stands on the pretrained body: the classifier, its hidden layer, BERT's pooler."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def _start_score_head(model: PreTrainedModel, fresh: set[str]) -> None:
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == 1 and is_head(model, f"{name}.weight")
    ]
    name, layer = layers[-1]
    if f"{name}.weight" not in fresh:
        return
    nn.init.normal_(layer.weight, std=(layer.in_features + 1) ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def learning_groups(
    model: PreTrainedModel, section: RewardModelSection, lr: float, decay: float
) -> list[ParameterGroup]:
    """Body and head, with and without decay; biases, norms and scalars never decay. Freezes what is told to be frozen."""
    model.requires_grad_(True)
    if section.freeze_embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)

    def learns(name: str) -> tuple[str, float, float]:
        head = is_head(model, name)
        rate = section.head_lr if head and section.head_lr is not None else lr
        return "head" if head else "body", rate, decay

    return grouped(model, learns)


# -------------------------------------------------------------------------------------------------------------- scoring


def padding_to_the_right(ids_NT: Tensor, mask_NT: Tensor) -> tuple[Tensor, Tensor]:
    """The same texts with all padding behind them, cut to the longest: models count positions from the left."""
    order_NT = mask_NT.argsort(dim=1, descending=True, stable=True)
    longest = int(mask_NT.sum(1).max())
    ids_NT, mask_NT = ids_NT.gather(1, order_NT), mask_NT.gather(1, order_NT)
    return ids_NT[:, :longest], mask_NT[:, :longest]


def scores_of(logits_NC: Tensor) -> Tensor:
    """One number per text, [N]: the score, or of two labels the second's logit minus the first's.

    Raises ValueError for three labels and more, where no number stands for the whole.
    """
    if logits_NC.shape[1] == 1:
        return logits_NC[:, 0]
    if logits_NC.shape[1] == 2:
        return logits_NC[:, 1] - logits_NC[:, 0]
    raise ValueError(f"{logits_NC.shape[1]} labels have no single score")


def normalisation(score_N: Tensor) -> tuple[float, float]:
    """Gain and bias with which gain · score + bias has mean 0 and deviation 1 over these texts (Ziegler et al. 2019, §2.1)."""
    score_N = score_N.double()
    gain = 1.0 / float(score_N.std(correction=0))
    return gain, -gain * float(score_N.mean())


# ------------------------------------------------------------------------------------------------------------- on disk


def empty_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same configuration, whose weights are still to be loaded."""
    copy: PreTrainedModel = AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32)
    return copy.eval()


def load_reward_model(location: str, device: torch.device) -> Scorer:
    """A model, checkpoint or run folder of `fmray reward`; raises CheckpointError in one line."""
    folder = find_model_folder(location)
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{location}: cannot be loaded: {str(error).splitlines()[0]}") from None
    return Scorer(model.to(device).eval(), tokenizer, int(getattr(model.config, "fmray_max_tokens", 256)))
