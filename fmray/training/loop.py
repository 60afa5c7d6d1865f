"""Contrastive pretraining, from a configuration to a checkpoint that serves. Read it top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fmray.config.schema import ObjectiveConfig, PretrainConfig
from fmray.data.loader import LoadedBatch, PairDataset, PairLoader
from fmray.data.sources import Source, open_source
from fmray.evaluation.embed import evaluate_pairs
from fmray.models.clip import DualEncoder, build_dual_encoder
from fmray.models.freezing import parameter_groups
from fmray.models.saved import save_dual_encoder
from fmray.objectives.contrastive import in_batch_accuracy, infonce, row_keys, siglip
from fmray.runtime.context import Context, Outcome
from fmray.training.averaging import WeightAverage
from fmray.training.course import Course
from fmray.training.engine import make_engine
from fmray.training.grad_cache import GradCache, Outputs, forward_outputs
from fmray.training.pair_learner import PairLearner
from fmray.training.schedule import noise_seed
from fmray.training.unreadable import Unreadable
from fmray.training.warm_start import start_at_ridge
from fmray.types import ImageTextBatch, Metrics


def pretrain(config: PretrainConfig, context: Context) -> Outcome:
    """Train, evaluate and save a dual encoder; the same code in one process and on every rank of many."""
    # -------------------------------------------------------------------------------- 1. who learns, from what
    source = open_source(config.data.source, "train")
    learner, dataset = make_learner(config, source, context)
    loader = PairLoader(dataset, context.rank, context.world_size)

    # --------------------------------------------------------------------------- 2. where an earlier run left off
    course = Course(
        learner,
        config.optimizer,
        config.train,
        context,
        export=learner.exported,
        evaluate=lambda _, exported: evaluated(exported, learner, config, context),
        saver=lambda exported: partial(save_dual_encoder, exported, learner.tokenizer),
    )
    first = course.resume()
    watch = Watch(config.data.batch_size, Unreadable(config.data.max_bad_share * len(source)))

    # --------------------------------------------------------------------------------------------- 3. the steps
    for step, loaded in loader.batches(first, config.train.steps):
        watch.data_arrived()
        batch = loaded.rows.to(context.device)
        loss, outputs = learn(learner, batch, config, context, step)
        updated = course.update(step)
        metrics = watch.metrics(loss, outputs, batch, loaded, context)
        if ended := course.close(step, metrics | updated):
            return ended
        watch.step_ended()
    return Outcome(steps=config.train.steps, finished=True)


def make_learner(config: PretrainConfig, source: Source, context: Context) -> tuple[PairLearner, PairDataset]:
    """Model, engine, average and what feeds them, fresh: every rank makes the same from the seed."""
    torch.manual_seed(config.run.seed)
    model, tokenizer = build_dual_encoder(config.model, config.objective, config.data)
    if config.engine.activation_checkpointing:
        model.vision.activation_checkpointing_enable()
        model.text.activation_checkpointing_enable()
    pad_to = model.config.max_tokens if model.config.pad_to_max else None
    dataset = PairDataset(source, tokenizer, config.data, model.image, config.run.seed, pad_to)
    if config.model.warm_start == "ridge":
        strength, precision = config.model.ridge_strength, config.engine.precision
        start_at_ridge(model.to(context.device), tokenizer, dataset, strength, precision, context)
    groups = parameter_groups(model, config.parts, config.optimizer.lr, config.optimizer.weight_decay)
    rows = config.data.batch_size // context.world_size
    micro_batch = min(rows, config.objective.grad_cache_chunk or rows)
    engine = make_engine(model.train(), groups, config.optimizer, config.engine, context.device, micro_batch)
    decay = config.optimizer.ema_decay
    average = WeightAverage(engine, decay, context) if decay else None
    return PairLearner(model, tokenizer, groups, engine, average), dataset


def learn(
    learner: PairLearner, batch: ImageTextBatch, config: PretrainConfig, context: Context, step: int
) -> tuple[Tensor, Outputs]:
    """One forward and backward: this rank's loss (its mean over ranks is the batch's) and embeddings, without graph."""
    objective, seed = config.objective, noise_seed(config.run.seed, step, context.rank)

    def loss_of(outputs: Outputs, rows: ImageTextBatch) -> Tensor:
        return contrastive_loss(outputs, rows, objective)

    if objective.grad_cache_chunk is not None and objective.grad_cache_chunk < len(batch):
        return GradCache(learner.engine, loss_of, objective.grad_cache_chunk).backward(batch, seed)
    torch.manual_seed(seed)
    outputs = forward_outputs(learner.engine, batch)
    loss = loss_of(outputs, batch)
    learner.engine.backward(loss)
    return loss.detach(), {name: value.detach() for name, value in outputs.items()}


def contrastive_loss(outputs: Outputs, batch: ImageTextBatch, objective: ObjectiveConfig) -> Tensor:
    """The configured loss of a batch's embeddings, scalar."""
    keys = batch.caption_key_B
    if objective.positives == "pair":
        keys = row_keys(len(batch), keys.device)
    image_BD, text_BD, scale = outputs["image_embeds"], outputs["text_embeds"], outputs["logit_scale"]
    if objective.kind == "siglip":
        return siglip(image_BD, text_BD, scale, outputs["logit_bias"], keys)
    return infonce(image_BD, text_BD, scale, keys, label_smoothing=objective.label_smoothing)


def evaluated(
    exported: DualEncoder, learner: PairLearner, config: PretrainConfig, context: Context
) -> Metrics:
    """Retrieval on the test split with the weights that would be saved."""
    started = time.perf_counter()
    model, data = exported.to(context.device), config.data
    measured = evaluate_pairs(
        model, learner.tokenizer, model.image, model.config.max_tokens, data, config.evaluate, context
    )
    exported.to("cpu")
    return measured | {"time/evaluate": time.perf_counter() - started}


@dataclass
class Watch:
    """Clocks and counters of the loop."""

    rows_per_step: int
    unreadable: Unreadable
    _mark: float = field(default_factory=time.perf_counter)
    _waited: float = 0.0

    def data_arrived(self) -> None:
        """A batch is there."""
        self._waited = time.perf_counter() - self._mark

    def step_ended(self) -> None:
        """The clock of the next step starts; checkpoints and evaluations are behind."""
        self._mark = time.perf_counter()

    def metrics(
        self, loss: Tensor, outputs: Outputs, batch: ImageTextBatch, loaded: LoadedBatch, context: Context
    ) -> Metrics:
        """This step's numbers, averaged over ranks; raises DataError where too many samples were unreadable."""
        accuracy = in_batch_accuracy(outputs["image_embeds"], outputs["text_embeds"], batch.caption_key_B)
        mean_loss, mean_accuracy = (context.sum(torch.stack([loss, accuracy])) / context.world_size).tolist()
        unreadable = self.unreadable.count(loaded.bad, loaded.epoch, context)
        seconds = time.perf_counter() - self._mark
        return {
            "train/loss": mean_loss,
            "train/batch_accuracy": mean_accuracy,
            "train/logit_scale": float(outputs["logit_scale"]),
            "train/epoch": float(loaded.epoch),
            "data/unreadable": float(unreadable),
            "time/step": seconds,
            "time/data": self._waited,
            "train/images_per_second": self.rows_per_step / seconds,
        }
