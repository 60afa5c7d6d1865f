"""From a reward's configuration to its role in a pool."""

from __future__ import annotations

from fmray.config.rewards import (
    AnswerReward,
    CallableReward,
    ClassifierReward,
    GrammarReward,
    HttpReward,
    LengthReward,
    LikelihoodReward,
    RepetitionReward,
    RewardConfig,
)
from fmray.rlhf.scorers_model import ClassifierScorer, GrammarScorer, LikelihoodScorer
from fmray.rlhf.scorers_others import CallableScorer
from fmray.rlhf.scorers_remote import HttpScorer
from fmray.rlhf.scorers_rules import AnswerScorer, LengthScorer, RepetitionScorer
from fmray.rlhf.scoring import RewardRole
from fmray.runtime.pool import Place


def build_scorer(config: RewardConfig, place: Place) -> RewardRole:
    """The role of a reward, with its model on the place's device; ConfigError where it cannot be built."""
    match config:
        case ClassifierReward():
            return ClassifierScorer(config, place.device)
        case GrammarReward():
            return GrammarScorer(config, place.device)
        case LikelihoodReward():
            return LikelihoodScorer(config, place.device)
        case LengthReward():
            return LengthScorer(config)
        case RepetitionReward():
            return RepetitionScorer(config)
        case AnswerReward():
            return AnswerScorer(config)
        case CallableReward():
            return CallableScorer(config)
        case HttpReward():
            return HttpScorer(config)
