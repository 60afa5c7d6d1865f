"""What happens around the steps of every training here: rates, reports, evaluations, checkpoints, the end.

A loop stays a loop: it learns from a batch, then says `update` and `close`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fmray.config.schema import OptimizerConfig, TrainConfig
from fmray.runtime.context import Context, Outcome
from fmray.training.checkpoint import Checkpoints, Learner, SaveModel
from fmray.training.engine import rates_at
from fmray.training.schedule import due
from fmray.types import Metrics

Exported = TypeVar("Exported")
"""The model as it would be saved now, free of engine and average."""


@dataclass(frozen=True, slots=True)
class Course(Generic[Exported]):
    """The way of one training from its first step to its last. Every method is a collective."""

    learner: Learner
    optimizer: OptimizerConfig
    train: TrainConfig
    context: Context
    export: Callable[[], Exported]
    """Called once where a step is followed by an evaluation or a checkpoint."""
    evaluate: Callable[[int, Exported], Metrics]
    """Steps done and the model in, what to report out."""
    saver: Callable[[Exported], SaveModel]

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.context, self.train.keep_checkpoints)

    def resume(self) -> int:
        """Steps that are done already, with everything as it was after them."""
        return self.checkpoints.resume(self.learner)

    def update(self, step: int) -> Metrics:
        """The optimizer's step and the average's, after the backward passes of step `step`."""
        rates = rates_at(self.learner.groups, self.optimizer, step, self.train.steps)
        norm = self.learner.engine.step(rates)
        if self.learner.average is not None:
            self.learner.average.update(step)
        return {"train/gradient_norm": norm, "train/learning_rate": max(rates)}

    def close(self, step: int, metrics: Metrics) -> Outcome | None:
        """Report, evaluate and save as far as it is due after step `step`; how the run ended, None where it goes on."""
        done = step + 1
        last = done == self.train.steps
        if last or due(done, self.train.log_every):
            self.context.report(done, metrics)
        stopping = self.context.stop_requested() and not last
        evaluating = last or (due(done, self.train.evaluate_every) and not stopping)
        saving = last or stopping or due(done, self.train.checkpoint_every)
        if evaluating or saving:
            exported = self.export()
        if evaluating:
            self.context.report(done, self.evaluate(done, exported))
        if saving:
            self.checkpoints.save(done, self.learner, self.saver(exported))
        return Outcome(steps=done, finished=last) if last or stopping else None
