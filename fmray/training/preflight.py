"""What can be known to fail before any worker starts: data, assets, towers. Also fetches assets once, not once per rank."""

from __future__ import annotations

from fmray.config.schema import PretrainConfig
from fmray.data.sources import open_source
from fmray.models.towers import load_tokenizer, tower_config


def check_pretrain(config: PretrainConfig) -> None:
    """Raises ConfigError, DataError or AssetError in one line."""
    open_source(config.data.source, "train")
    open_source(config.data.source, "test")
    if config.model.checkpoint is None:
        tower_config(config.model.vision, "model.vision", None)
        tower_config(config.model.text, "model.text", None)
        load_tokenizer(config.model.text, "model.text")
