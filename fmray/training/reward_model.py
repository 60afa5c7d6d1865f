"""Reward-model training, from a configuration to a scorer that judges as people did. Read it top to bottom."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fmray.config.reward import RewardModelConfig
from fmray.data.text_batches import LengthBuckets, VerdictBatch, VerdictLoader, token_rows
from fmray.data.verdicts import Verdicts, open_verdicts, reference_texts, spread
from fmray.errors import ConfigError, DataError
from fmray.evaluation.verdicts import evaluate_verdicts, score_tokens
from fmray.models.freezing import ParameterGroup
from fmray.models.language import save_language_model
from fmray.models.reward_model import (
    Scorer,
    build_reward_model,
    empty_copy,
    is_decoder_only,
    learning_groups,
    normalisation,
    scores_of,
)
from fmray.objectives.preference import all_pairs, classification, pair_differences, pairwise, plackett_luce
from fmray.runtime.context import Context, Outcome
from fmray.training.averaging import WeightAverage, whole_weights
from fmray.training.checkpoint import Memory, SaveModel
from fmray.training.course import Course
from fmray.training.engine import Engine, make_engine
from fmray.training.schedule import noise_seed
from fmray.types import Metrics


def train_reward_model(config: RewardModelConfig, context: Context) -> Outcome:
    """Train, measure and save a scorer; the same code in one process and on every rank of many."""
    # ------------------------------------------------------------------------------- 1. who learns, from what
    torch.manual_seed(config.run.seed)
    verdicts = open_verdicts(config.data)
    scorer = build_reward_model(config.model, verdicts.labels)
    if learns_with_trl(config, scorer.model.config):
        from fmray.training.reward_trl import train_with_trl

        return train_with_trl(config, scorer, verdicts, context)
    learner = make_learner(config, scorer, context)
    loader = make_loader(config, scorer, verdicts, context)

    # -------------------------------------------------------------------------- 2. where an earlier run left off
    course = Course(
        learner,
        config.optimizer,
        config.train,
        context,
        export=lambda: exported(learner, verdicts, config, context),
        evaluate=lambda done, finished: measure(done, finished, verdicts, config, context),
        saver=saver,
    )
    first, steps = course.resume(), config.train.steps

    # --------------------------------------------------------------------------------------------- 3. the steps
    for step in range(first, steps):
        started = time.perf_counter()
        batches = [batch.to(context.device) for batch in loader.batches(step)]
        learned = learn(learner, batches, config, context, step)
        updated = course.update(step)
        metrics = learned.over_ranks(context, time.perf_counter() - started)
        metrics |= updated | {"train/epoch": float(loader.buckets.epoch(step))}
        if ended := course.close(step, metrics):
            return ended
    return Outcome(steps=steps, finished=True)


def learns_with_trl(config: RewardModelConfig, model: PreTrainedConfig) -> bool:
    """Whether trl's RewardTrainer does the learning. Raises ConfigError where it was asked for and cannot."""
    decoder_only = is_decoder_only(model)
    if config.trainer == "trl" and not decoder_only:
        cure = f"{config.model.source} is no decoder-only model, which its RewardTrainer is for; use trainer=fmray"
        raise ConfigError("trainer", "trl", cure)
    pairs = config.data.kind == "pairs" and config.loss == "pairwise"
    return config.trainer == "trl" or (config.trainer == "auto" and decoder_only and pairs)


# ------------------------------------------------------------------------------------------------------- what learns


@dataclass(frozen=True, slots=True)
class RewardLearner:
    """`Learner` of a reward model; it remembers nothing beside weights and moments."""

    scorer: Scorer
    groups: list[ParameterGroup]
    engine: Engine
    average: WeightAverage | None

    @property
    def model(self) -> PreTrainedModel:
        return self.scorer.model

    def remember(self) -> Memory:
        return Memory()

    def recall(self, memories: list[Memory]) -> None:
        """Nothing to recall."""


def make_learner(config: RewardModelConfig, scorer: Scorer, context: Context) -> RewardLearner:
    """Engine and average around a fresh model; every rank makes the same from the seed."""
    model = scorer.model.train()
    if config.engine.activation_checkpointing:
        model.gradient_checkpointing_enable()
    groups = learning_groups(model, config.model, config.optimizer.lr, config.optimizer.weight_decay)
    rows = config.data.batch_size // context.world_size
    micro_batch = min(rows, config.data.micro_batch_size or rows)
    engine = make_engine(model, groups, config.optimizer, config.engine, context.device, micro_batch)
    decay = config.optimizer.ema_decay
    return RewardLearner(scorer, groups, engine, WeightAverage(engine, decay, context) if decay else None)


def make_loader(
    config: RewardModelConfig, scorer: Scorer, verdicts: Verdicts, context: Context
) -> VerdictLoader:
    """This rank's rows of every step, tokenised once."""
    data, rows = config.data, token_rows(verdicts.train, scorer.tokenize)
    lengths = [max(map(len, row)) for row in rows]
    return VerdictLoader(
        verdicts.train,
        rows,
        LengthBuckets(lengths, data.batch_size, data.bucket_batches, config.run.seed),
        scorer.tokenizer.pad_token_id,
        config.objective.margin,
        context.rank,
        context.world_size,
        data.micro_batch_size,
    )


# ---------------------------------------------------------------------------------------------------------- learning


@dataclass(slots=True)
class Learned:
    """A step's sums on this rank."""

    rows: int = 0
    loss: float = 0.0
    compared: int = 0
    """Rows with a label, or pairs of answers."""
    right: float = 0.0
    tokens: int = 0

    def over_ranks(self, context: Context, seconds: float) -> Metrics:
        """The step's metrics over all ranks."""
        mine = [self.rows, self.loss, self.compared, self.right, self.tokens]
        sums = context.sum(torch.tensor(mine, dtype=torch.float64, device=context.device))
        rows, loss, compared, right, tokens = sums.tolist()
        return {
            "train/loss": loss / rows,
            "train/accuracy": right / compared,
            "time/step": seconds,
            "train/samples_per_second": rows / seconds,
            "train/tokens_per_second": tokens / seconds,
        }


def learn(
    learner: RewardLearner,
    batches: list[VerdictBatch],
    config: RewardModelConfig,
    context: Context,
    step: int,
) -> Learned:
    """Forward and backward of each micro-batch; the gradient is that of the mean over the step's rows."""
    torch.manual_seed(noise_seed(config.run.seed, step, context.rank))
    learned, rows = Learned(), sum(map(len, batches))
    for number, batch in enumerate(batches, start=1):
        logits_NC = learner.engine.forward(input_ids=batch.ids_NT, attention_mask=batch.mask_NT).logits
        loss = verdict_loss(logits_NC, batch, config)
        learner.engine.backward(loss * (len(batch) / rows), last=number == len(batches))
        learned.rows += len(batch)
        learned.loss += float(loss.detach()) * len(batch)
        right, compared = judged_right(logits_NC.detach(), batch, config.loss)
        learned.right, learned.compared = learned.right + right, learned.compared + compared
        learned.tokens += int(batch.mask_NT.sum())
    return learned


def verdict_loss(logits_NC: Tensor, batch: VerdictBatch, config: RewardModelConfig) -> Tensor:
    """The configured loss of a batch's logits: mean over its rows, scalar."""
    kind = config.loss
    if kind == "classification":
        return classification(logits_NC, batch.label_B, label_smoothing=config.objective.label_smoothing)
    scores_BK = batch.by_row(logits_NC[:, 0])
    if kind == "pairwise":
        return pairwise(scores_BK[:, 0], scores_BK[:, 1], batch.margin_B)
    if kind == "all_pairs":
        return all_pairs(scores_BK, batch.there_BK, batch.margin_B)
    return plackett_luce(scores_BK, batch.there_BK)


def judged_right(logits_NC: Tensor, batch: VerdictBatch, kind: str) -> tuple[float, int]:
    """How many labels or pairs were judged as people did (a tie is half), of how many."""
    if kind == "classification":
        return float((logits_NC.argmax(1) == batch.label_B).sum()), len(batch)
    lead_P = pair_differences(batch.by_row(logits_NC[:, 0]), batch.there_BK)
    return float(((lead_P.sign() + 1) / 2).sum()), len(lead_P)


# ------------------------------------------------------------------------------------------------------- what comes out


def exported(
    learner: RewardLearner, verdicts: Verdicts, config: RewardModelConfig, context: Context
) -> Scorer:
    """A plain copy of the scorer as it would be saved now, its scale in the configuration; a collective."""
    copy = empty_copy(learner.model)
    copy.load_state_dict(whole_weights(learner.model, learner.engine, learner.average), strict=False)
    scorer = Scorer(copy.to(context.device), learner.scorer.tokenizer, learner.scorer.max_tokens)
    if config.normalizes:
        write_scale(scorer, verdicts, config, context)
    return scorer


def write_scale(scorer: Scorer, verdicts: Verdicts, config: RewardModelConfig, context: Context) -> None:
    """`fmray_gain` and `fmray_bias` into the model's configuration, so that gain · score + bias is 0 ± 1 on the texts."""
    normalize = config.normalize
    if len(scorer.labels) > 2:
        raise ConfigError(
            "normalize.on", True, f"{len(scorer.labels)} labels have no single score; leave it off"
        )
    texts: list[str] = [text for verdict in verdicts.train for text in verdict.texts]
    if normalize.texts is not None:
        texts = reference_texts(normalize.texts)
    chosen = list(spread(tuple(texts), normalize.max_texts))
    logits_NC = score_tokens(scorer, scorer.tokenize(chosen), config.evaluate.batch_size, context)
    score_N = scores_of(logits_NC)
    if float(score_N.std()) < 1e-6:
        raise DataError(
            f"all {len(chosen)} reference texts score {float(score_N[0]):.3g}: the model tells nothing apart"
        )
    gain, bias = normalisation(score_N)
    scorer.model.config.fmray_gain, scorer.model.config.fmray_bias = gain, bias


def measure(
    step: int, scorer: Scorer, verdicts: Verdicts, config: RewardModelConfig, context: Context
) -> Metrics:
    """Accuracy and calibration on every held-out part, written to `evaluation.json` too."""
    started = time.perf_counter()
    metrics, tables = evaluate_verdicts(scorer, verdicts.held_out, config.evaluate, context)
    if context.rank == 0:
        scale = {key: getattr(scorer.model.config, f"fmray_{key}", None) for key in ("gain", "bias")}
        result = {"step": step, "metrics": metrics, "by_confidence": tables, "normalisation": scale}
        context.folder.write_text(json.dumps(result, indent=1) + "\n", "evaluation.json")
    return metrics | {"time/evaluate": time.perf_counter() - started}


def saver(scorer: Scorer) -> SaveModel:
    """Writes the folder that `AutoModelForSequenceClassification.from_pretrained` loads."""
    model = scorer.model
    once = {
        name for name, _ in [*model.named_parameters(), *model.named_buffers()]
    }  # tied weights have several
    weights = {name: value.cpu() for name, value in model.state_dict().items() if name in once}
    return partial(save_language_model, model, weights, scorer.tokenizer)
