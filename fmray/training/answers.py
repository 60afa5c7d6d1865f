"""Training of a model that answers about pictures, from a configuration to a checkpoint that serves. Read it top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel

from fmray.config.answers import AnswersConfig
from fmray.data.dialogue_loader import DialogueDataset, DialogueLoader, LoadedDialogues
from fmray.data.dialogues import DialogueSource, open_dialogues
from fmray.evaluation.answer_run import measure
from fmray.models.answering import AnswerBatch, Answering, AnswerOutput, build_answering
from fmray.models.freezing import ParameterGroup, parameter_groups
from fmray.runtime.context import Context, Outcome
from fmray.training.averaging import WeightAverage, whole_weights
from fmray.training.checkpoint import Memory, SaveModel
from fmray.training.course import Course
from fmray.training.engine import Engine, make_engine
from fmray.training.features import MEBIBYTE, FeatureCache
from fmray.training.replies import remember_replies
from fmray.training.schedule import noise_seed
from fmray.training.unreadable import Unreadable
from fmray.types import Metrics


def train_answers(config: AnswersConfig, context: Context) -> Outcome:
    """Train, evaluate and save a model that answers; the same code in one process and on every rank of many."""
    # -------------------------------------------------------------------------------- 1. who learns, from what
    source = open_dialogues(config.data.source, "train")
    learner = make_learner(config, source, context)
    dataset = DialogueDataset(
        source, config.data, learner.answering.image, config.run.seed, decode=learner.features is None
    )
    loader = DialogueLoader(dataset, context.rank, context.world_size)

    # --------------------------------------------------------------------------- 2. where an earlier run left off
    course = Course(
        learner,
        config.optimizer,
        config.train,
        context,
        export=learner.exported,
        evaluate=lambda done, exported: measure(done, exported, config.data, config.evaluate, context),
        saver=saver,
    )
    first = course.resume()
    watch = Watch(Unreadable(config.data.max_bad_share * len(dataset.groups)))

    # --------------------------------------------------------------------------------------------- 3. the steps
    for step, loaded in loader.batches(first, config.train.steps):
        watch.data_arrived()
        batches = learner.batches(loaded, config, context)
        learned = learn(learner, batches, config, context, step)
        updated = course.update(step)
        metrics = watch.metrics(learned, loaded, context)
        if ended := course.close(step, metrics | updated):
            return ended
        watch.step_ended()
    return Outcome(steps=config.train.steps, finished=True)


# ------------------------------------------------------------------------------------------------------- what learns


@dataclass(frozen=True, slots=True)
class AnswerLearner:
    """`Learner` of a model that answers; it remembers nothing beside weights and moments."""

    answering: Answering
    groups: list[ParameterGroup]
    engine: Engine
    average: WeightAverage | None
    features: FeatureCache | None
    """None: the picture tower runs in every forward pass."""

    @property
    def model(self) -> PreTrainedModel:
        return self.answering.model

    def batches(self, loaded: LoadedDialogues, config: AnswersConfig, context: Context) -> list[AnswerBatch]:
        """A step's dialogues as micro-batches of tensors on the device."""
        parts = loaded.micro_batches(config.data.micro_batch_size or len(loaded.groups))
        batches = []
        for part in parts:
            pictures = part.pictures
            if self.features is not None and pictures.keys:
                pictures = self.features.pictures(pictures.keys)
            batches.append(self.answering.collate(part.dialogues, pictures).to(context.device))
        return batches

    def exported(self) -> Answering:
        """A plain copy as it would be saved now, on the CPU, free of engine and adapter; a collective."""
        copy = self.answering.empty_copy()
        whole = whole_weights(self.model, self.engine, self.average)
        # buffers that are not saved (position ids) are among the weights too
        copy.model.load_state_dict(self.answering.plain_weights(whole), strict=False)
        copy.model.eval().requires_grad_(False)
        copy.hold_locked_parts()  # nothing of it learns: each distinct question passes its tower once
        return copy

    def remember(self) -> Memory:
        return Memory()

    def recall(self, memories: list[Memory]) -> None:
        """Nothing to recall."""


def make_learner(config: AnswersConfig, source: DialogueSource, context: Context) -> AnswerLearner:
    """Model, engine and average, fresh: every rank makes the same from the seed."""
    torch.manual_seed(config.run.seed)
    answering = build_answering(config.model, [source[index] for index in range(len(source))])
    remember_replies(answering, source, context.device)
    if config.engine.activation_checkpointing:
        answering.model.activation_checkpointing_enable()
    parts, optimizer, engine = config.learning, config.optimizer, config.engine
    groups = parameter_groups(answering.model, parts, optimizer.lr, optimizer.weight_decay)
    answering.hold_locked_parts()
    if context.device.type == "cpu" and engine.precision == "bf16":
        # torch's fused attention goes back 2 to 7 times as slowly there as plain products do, on rows as short as these
        answering.model.set_attn_implementation("eager")
    rows = config.data.batch_size // context.world_size
    micro_batch = min(rows, config.data.micro_batch_size or rows)
    model = answering.model.train()
    made = make_engine(model, groups, optimizer, engine, context.device, micro_batch)
    sharded = engine.kind == "deepspeed" and engine.zero_stage == 3
    locked = not any(p.requires_grad for p in model.vision.parameters())
    features = None
    if locked and config.data.cache_features and not config.data.augment.active and not sharded:
        memory = config.data.cache_decoded * MEBIBYTE
        features = FeatureCache(answering, source, context.device, engine.precision, memory)
    average = WeightAverage(made, optimizer.ema_decay, context) if optimizer.ema_decay else None
    return AnswerLearner(answering, groups, made, average, features)


# ---------------------------------------------------------------------------------------------------------- learning


@dataclass(slots=True)
class Learned:
    """A step's sums on this rank."""

    loss: float = 0.0
    """Σ over labelled tokens."""
    replies: float = 0.0
    """What of it answers of pictures added; 0 where the model has words alone."""
    tokens: int = 0
    dialogues: int = 0


def learn(
    learner: AnswerLearner, batches: list[AnswerBatch], config: AnswersConfig, context: Context, step: int
) -> Learned:
    """Forward and backward of each micro-batch; the gradient is that of the mean over all ranks' labelled tokens."""
    torch.manual_seed(noise_seed(config.run.seed, step, context.rank))
    mine = sum(batch.tokens for batch in batches)
    everyones = context.sum(torch.tensor(float(mine), device=context.device)).item()
    learned = Learned()
    for number, batch in enumerate(batches, start=1):
        output: AnswerOutput = learner.engine.forward(**batch.inputs, loss_only=True)
        loss = output.loss
        assert loss is not None
        # engines average the ranks' gradients: their number makes it the sum again
        share = batch.tokens * context.world_size / everyones
        learner.engine.backward(loss * share, last=number == len(batches))
        learned.loss += loss.item() * batch.tokens
        if output.reply_loss is not None:
            learned.replies += output.reply_loss.item() * batch.tokens
        learned.tokens += batch.tokens
        learned.dialogues += batch.dialogues
    return learned


@dataclass
class Watch:
    """Clocks and counters of the loop."""

    unreadable: Unreadable
    _mark: float = field(default_factory=time.perf_counter)
    _waited: float = 0.0

    def data_arrived(self) -> None:
        """The dialogues are there."""
        self._waited = time.perf_counter() - self._mark

    def step_ended(self) -> None:
        """The clock of the next step starts; checkpoints and evaluations are behind."""
        self._mark = time.perf_counter()

    def metrics(self, learned: Learned, loaded: LoadedDialogues, context: Context) -> Metrics:
        """This step's numbers over all ranks; raises DataError where too many pictures were unreadable."""
        mine = [learned.loss, learned.tokens, learned.dialogues, learned.replies]
        sums = context.sum(torch.tensor(mine, dtype=torch.float64, device=context.device))
        loss, tokens, dialogues, replies = sums.tolist()
        unreadable = self.unreadable.count(loaded.bad, loaded.epoch, context)
        seconds = time.perf_counter() - self._mark
        return {
            "train/loss": loss / tokens,
            **({"train/reply_loss": replies / tokens} if replies else {}),
            "train/epoch": float(loaded.epoch),
            "data/unreadable": float(unreadable),
            "time/step": seconds,
            "time/data": self._waited,
            "train/samples_per_second": dialogues / seconds,
            "train/tokens_per_second": tokens / seconds,
        }


# ------------------------------------------------------------------------------------------------------- what comes out


def saver(answering: Answering) -> SaveModel:
    """Writes the folder that `load_answering` opens and an endpoint serves."""
    weights = {name: value.cpu() for name, value in answering.model.state_dict().items()}
    return partial(answering.save, weights)
