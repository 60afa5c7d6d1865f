"""What can be known to fail before any worker starts: data, assets, towers. Also fetches assets once, not once per rank."""

from __future__ import annotations

from fmray.config.answers import AnswersConfig, VqaModelConfig
from fmray.config.reward import RewardModelConfig
from fmray.config.schema import PretrainConfig
from fmray.data.dialogues import open_dialogues
from fmray.data.sources import open_source
from fmray.data.verdicts import open_verdicts, reference_texts
from fmray.models.reward_model import model_config
from fmray.models.towers import load_tokenizer, locate_model, tower_config
from fmray.training.reward_model import learns_with_trl


def check_pretrain(config: PretrainConfig) -> None:
    """Raises ConfigError, DataError or AssetError in one line."""
    open_source(config.data.source, "train")
    open_source(config.data.source, "test")
    if config.model.checkpoint is None:
        tower_config(config.model.vision, "model.vision", None)
        tower_config(config.model.text, "model.text", None)
        load_tokenizer(config.model.text, "model.text")


def check_answers(config: AnswersConfig) -> None:
    """Raises ConfigError, DataError, AssetError or CheckpointError in one line."""
    open_dialogues(config.data.source, "train")
    open_dialogues(config.data.source, "test")
    if config.model.checkpoint is not None:
        locate_model(config.model.checkpoint, "model.checkpoint")
        return
    if isinstance(config.model, VqaModelConfig):
        tower_config(config.model.vision, "model.vision", None)
        load_tokenizer(config.model.text, "model.text")
    elif not config.model.vision.source.startswith("arch:"):
        locate_model(config.model.vision.source, "model.vision.source")


def check_reward(config: RewardModelConfig) -> None:
    """Raises ConfigError, DataError or AssetError in one line."""
    verdicts = open_verdicts(config.data)
    if config.normalize.texts is not None:
        reference_texts(config.normalize.texts)
    if learns_with_trl(config, model_config(config.model, verdicts.labels)):
        from fmray.training.reward_trl import check_trl

        check_trl(config)
