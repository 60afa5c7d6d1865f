"""What `fmray pretrain` trains: each task with its root and recipes."""

from __future__ import annotations

from fmray.config.answer_recipes import ANSWER_RECIPES
from fmray.config.answers import AnswersConfig
from fmray.config.loading import Task
from fmray.config.recipes import PRETRAIN_RECIPES
from fmray.config.schema import PretrainConfig

PRETRAIN_TASKS: dict[str, Task] = {
    "pairs": (PretrainConfig, PRETRAIN_RECIPES),
    "answers": (AnswersConfig, ANSWER_RECIPES),
}
"""By the configuration's `task`."""
