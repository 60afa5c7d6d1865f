"""What `fmray pretrain` trains and `fmray evaluate` measures: each task with its root and recipes."""

from __future__ import annotations

from fmray.config.answer_recipes import ANSWER_RECIPES
from fmray.config.answers import AnswersConfig, AnswersEvaluateRunConfig
from fmray.config.loading import Task
from fmray.config.recipes import EVALUATE_RECIPES, PRETRAIN_RECIPES
from fmray.config.schema import EvaluateRunConfig, PretrainConfig

PRETRAIN_TASKS: dict[str, Task] = {
    "pairs": (PretrainConfig, PRETRAIN_RECIPES),
    "answers": (AnswersConfig, ANSWER_RECIPES),
}
"""By the configuration's `task`."""

EVALUATE_TASKS: dict[str, Task] = {
    "pairs": (EvaluateRunConfig, EVALUATE_RECIPES),
    "answers": (AnswersEvaluateRunConfig, {}),
}
"""By the configuration's `task`."""
