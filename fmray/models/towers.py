"""Towers: any transformers vision or text model as "a batch in, one vector per row out".

B rows  T tokens or patches  C,H,W pixels  F width of the tower
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipTextConfig,
    SiglipTextModel,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from fmray.assets import fetch
from fmray.config.schema import TowerConfig
from fmray.errors import ConfigError
from fmray.manifest import find_model_folder
from fmray.models.sentence_encoder import SentenceEncoderConfig  # registers itself with the auto classes

Pooling = Literal["cls", "mean", "eos", "last", "pooler"]

OWN_POOLER = {
    "clip_vision_model",
    "clip_text_model",
    "siglip_vision_model",
    "siglip_text_model",
    SentenceEncoderConfig.model_type,
}
"""Architectures whose pooled output is trained; the others' is an untrained or next-sentence head: left out."""
POOLS_BY_MEAN = {
    "bert",
    "distilbert",
    "roberta",
    "xlm-roberta",
    "mpnet",
    "mobilenet_v2",
    "resnet",
    "efficientnet",
}
READS_LAST_TOKEN = {"gpt2", "llama", "qwen2", "qwen3"}
DROPOUT_KEYS = (
    "dropout",
    "attention_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "classifier_dropout_prob",
)


def locate(source: str, key: str) -> str:
    """What `from_pretrained` takes: an asset's folder, a local folder or a hub id."""
    if source.startswith("asset:"):
        return str(fetch(source.removeprefix("asset:")))
    if source.startswith(("/", "./", "../", "~")) and not Path(source).expanduser().is_dir():
        raise ConfigError(key, source, "no such folder")
    return str(Path(source).expanduser()) if source.startswith("~") else source


def locate_model(source: str, key: str) -> str:
    """As `locate`, and for a run or checkpoint folder the model in it; raises CheckpointError where it holds none."""
    location = locate(source, key)
    folder = Path(location)
    # a run folder has a config.json too, so that alone does not tell a model
    holds_one = any((folder / name).is_dir() for name in ("checkpoints", "model"))
    if folder.is_dir() and (holds_one or not (folder / "config.json").is_file()):
        return find_model_folder(location)
    return location


def tower_config(tower: TowerConfig, key: str, dropout: float | None) -> PreTrainedConfig:
    """The transformers configuration of a tower with the user's overrides; an override it does not have is refused."""
    if tower.source.startswith("arch:"):
        architecture = tower.source.removeprefix("arch:")
        if tower.pretrained:
            raise ConfigError(
                f"{key}.pretrained",
                True,
                f"{tower.source} is an architecture without weights: set it to false",
            )
        try:
            config = AutoConfig.for_model(architecture)
        except ValueError:
            raise ConfigError(
                f"{key}.source", tower.source, "transformers has no such architecture"
            ) from None
    else:
        config = _read_config(locate(tower.source, f"{key}.source"), f"{key}.source")
    changes = dict(tower.overrides)
    if dropout is not None:
        changes |= {name: dropout for name in DROPOUT_KEYS if hasattr(config, name)}
    for name, value in changes.items():
        if not hasattr(config, name):
            raise ConfigError(f"{key}.overrides.{name}", value, f"{config.model_type} has no such key")
        setattr(config, name, value)
    return config


def _read_config(location: str, key: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            key, location, f"cannot be loaded: {reason} (no network? use an asset: or a folder)"
        ) from None


def sub_config(value: PreTrainedConfig | dict[str, Any] | None, default: str) -> PreTrainedConfig:
    """A tower's configuration inside a whole model's, from keys or as a copy: models write into their configurations."""
    if isinstance(value, PreTrainedConfig):
        return copy.deepcopy(value)
    keys = dict(value or {"model_type": default})
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def tower_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The bare model class of a configuration (AutoModel does not know SigLIP's text tower)."""
    if isinstance(config, SiglipTextConfig):
        return SiglipTextModel  # type: ignore[no-any-return]
    if type(config) not in MODEL_MAPPING:
        raise ConfigError(
            "model.*.source", config.model_type, "is not a tower; take a vision or a text model"
        )
    found: type[PreTrainedModel] = MODEL_MAPPING[type(config)]
    return found


def new_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower with fresh weights and no untrained pooler."""
    kind = tower_class(config)
    return kind(config, **_without_pooler(kind))


def pretrained_tower(tower: TowerConfig, config: PreTrainedConfig, key: str) -> PreTrainedModel:
    """A tower with its saved weights; a missing weight is an error, an unused one (heads, poolers) is not."""
    kind = tower_class(config)
    location = locate(tower.source, f"{key}.source")
    try:
        model, info = kind.from_pretrained(
            location,
            config=config,
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,
            **_without_pooler(kind),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{key}.source", tower.source, f"cannot be loaded: {str(error).splitlines()[0]}"
        ) from None
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(f"{key}.source", tower.source, f"does not hold the tower's weights: {missing}, …")
    return model


def _without_pooler(kind: type[PreTrainedModel]) -> dict[str, Any]:
    return (
        {"add_pooling_layer": False}
        if "add_pooling_layer" in inspect.signature(kind.__init__).parameters
        else {}
    )


def load_tokenizer(tower: TowerConfig, key: str) -> PreTrainedTokenizerFast:
    """The text tower's tokenizer, padding on the right."""
    location = locate(tower.source, f"{key}.source")
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}.source", tower.source, f"has no tokenizer: {str(error).splitlines()[0]}"
        ) from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def default_pooling(config: PreTrainedConfig) -> Pooling:
    """The architecture's own way from a sequence to one vector."""
    if config.model_type in OWN_POOLER:
        return "pooler"
    if config.model_type in POOLS_BY_MEAN:
        return "mean"
    return "last" if config.model_type in READS_LAST_TOKEN else "cls"


def tower_width(config: PreTrainedConfig) -> int:
    """F: the width of a tower's output."""
    if config.model_type == "mobilenet_v2":
        return max(1280, int(1280 * config.depth_multiplier)) if config.finegrained_output else 1280
    if config.model_type == "resnet":
        return int(config.hidden_sizes[-1])
    return int(config.hidden_size)


def pool(outputs: Any, pooling: Pooling, mask_BT: Tensor | None = None) -> Tensor:
    """One vector per row, [B, F]; feature maps [B, F, H, W] are averaged over the picture."""
    if pooling == "pooler":
        return _tensor(outputs.pooler_output)
    hidden = _tensor(outputs.last_hidden_state)
    if hidden.dim() == 4:
        return hidden.mean(dim=(2, 3))
    if pooling == "cls":
        return hidden[:, 0]
    if mask_BT is None:
        mask_BT = hidden.new_ones(hidden.shape[:2])
    if pooling == "mean":
        weight_BT1 = mask_BT.to(hidden.dtype).unsqueeze(-1)
        return (hidden * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
    last_B = (
        mask_BT.long().sum(1).clamp(min=1) - 1
    )  # right-padded: the end-of-text token is the last real one
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last_B]


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor), "the tower returned no such output"
    return value


def fold_batch_norm(module: nn.Module) -> None:
    """Merge every BatchNorm with the convolution before it, in place: w' = w·γ/σ, b' = (b − μ)·γ/σ + β.

    The same function as with held statistics (Jacob et al. 2018, §3.2), about 1.5 times as fast on a CPU.
    """
    for child in module.modules():
        before: tuple[str, nn.Module] | None = None
        for name, layer in list(child.named_children()):
            if isinstance(layer, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
                setattr(child, before[0], fuse_conv_bn_eval(before[1].eval(), layer.eval()))
                setattr(child, name, nn.Identity())
            before = (name, layer)


def is_convolutional(config: PreTrainedConfig) -> bool:
    """Whether a vision tower is faster with its channels last in memory."""
    return config.model_type in (
        "mobilenet_v1",
        "mobilenet_v2",
        "resnet",
        "efficientnet",
        "convnext",
        "regnet",
    )


def hold_batch_norm(module: nn.Module) -> None:
    """Keep BatchNorm statistics as they were pretrained; its scale and shift still learn.

    Statistics of the batch would make 2 ranks differ from 1, and GradCache's chunks from the whole batch.
    """
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()
