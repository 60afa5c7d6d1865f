"""fmray's side of `fmray benchmark vqa`: the training room's own learner and steps, one stretch of them for each question."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fmray.benchmarks.vqa_bench import VqaBench
from fmray.config.answers import AnswersConfig
from fmray.data.dialogue_loader import DialogueDataset, DialogueLoader, LoadedDialogues
from fmray.models.vqa_answering import VqaAnswering
from fmray.runtime.context import WorkerContext
from fmray.training.answers import AnswerLearner, Watch, learn, make_learner
from fmray.training.engine import rates_at
from fmray.training.unreadable import Unreadable


@dataclass
class OurLoop:
    """`OurLoop.of(bench, config)`: what `train_answers` does between checkpoints, with clocks around it."""

    config: AnswersConfig
    context: WorkerContext
    learner: AnswerLearner
    dataset: DialogueDataset
    done: int = 0
    """Steps so far."""
    _watch: Watch = field(default_factory=lambda: Watch(Unreadable(0.0)))

    @classmethod
    def of(cls, bench: VqaBench, config: AnswersConfig, features: Path | None = None) -> Self:
        """A fresh learner; the same weights for the same configuration. `features`: where a feature cache writes."""
        context = bench.context(config)
        learner = make_learner(config, bench.train, context)
        if learner.features is not None and features is not None:
            features.mkdir(parents=True, exist_ok=True)
            learner.features.folder = features
        decode, image = learner.features is None, learner.answering.image
        dataset = DialogueDataset(bench.train, config.data, image, config.run.seed, decode=decode)
        loop = cls(config, context, learner, dataset)
        loop._read_everything()
        return loop

    def _read_everything(self) -> None:
        """Every picture decoded or passed through its locked tower, questions through theirs, as in any epoch but the first."""
        loaded = self.dataset.__getitems__(list(range(len(self.dataset.groups))))
        self.learner.batches(loaded, self.config, self.context)

    @property
    def answering(self) -> VqaAnswering:
        answering = self.learner.answering
        assert isinstance(answering, VqaAnswering)
        return answering

    def first_batch(self) -> LoadedDialogues:
        """What the first step learns from."""
        return next(DialogueLoader(self.dataset, 0, 1).batches(0, 1))[1]

    def first_loss(self) -> tuple[float, float]:
        """Loss of the first batch and its gradient's norm before clipping; the step is done."""
        batches = self.learner.batches(self.first_batch(), self.config, self.context)
        learned = learn(self.learner, batches, self.config, self.context, 0)
        self.done = 1
        return learned.loss / learned.tokens, self._update(0)

    def seconds_per_question(self, *, warm: int, steps: int) -> float:
        """Over `steps` steps of loading, collating, learning and reporting, `warm` (at least 1) before them not counted."""
        loader, questions, began = DialogueLoader(self.dataset, 0, 1), 0, 0.0
        first, last = self.done + warm, self.done + warm + steps
        for step, loaded in loader.batches(self.done, last):
            self._watch.data_arrived()
            batches = self.learner.batches(loaded, self.config, self.context)
            learned = learn(self.learner, batches, self.config, self.context, step)
            self._update(step)
            self._watch.metrics(learned, loaded, self.context)
            self._watch.step_ended()
            if step == first - 1:
                began = time.perf_counter()
            elif step >= first:
                questions += learned.dialogues
        ended = time.perf_counter()
        self.done = last
        return (ended - began) / questions

    def _update(self, step: int) -> float:
        rates = rates_at(self.learner.groups, self.config.optimizer, step, self.config.train.steps)
        return self.learner.engine.step(rates)
