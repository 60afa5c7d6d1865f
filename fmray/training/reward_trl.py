"""Pairs for decoder-only models through trl's RewardTrainer, inside one of our runs.

Ours: the model and its head, tokens, optimizer and schedule, names of the metrics, evaluation, normalisation, the finished model.
trl's (transformers.Trainer's): the loop, the loss, the order of the data, DDP, the checkpoints to resume from (`<run>/trl`).
So, unlike in our own loop: the run folder must be on a local disk; those checkpoints have no checksums, hold optimizer and
random states in torch's own format and open on the same number of workers only; batches are not bucketed by length; there is
no DeepSpeed and no average of the weights; and the run folder holds no model until the run has finished.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from fmray.config.reward import RewardModelConfig
from fmray.data.text_batches import token_rows
from fmray.data.verdicts import Verdicts
from fmray.errors import ConfigError, require_package
from fmray.manifest import newest_good
from fmray.models.reward_model import Scorer, learning_groups
from fmray.runtime.context import Context, Outcome
from fmray.runtime.metrics import drop_reports_after
from fmray.runtime.run_folder import RunFolder
from fmray.training.checkpoint import Checkpoints
from fmray.training.engine import TorchEngine, make_adamw, schedule_at
from fmray.training.reward_model import RewardLearner, exported, measure, saver
from fmray.training.schedule import due

RENAMED = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "grad_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "epoch": "train/epoch",
}
"""trl's names and ours; its others (rewards' minimum, mean, maximum) are in `<run>/trl/checkpoint-*/trainer_state.json`."""


def train_with_trl(
    config: RewardModelConfig, scorer: Scorer, verdicts: Verdicts, context: Context
) -> Outcome:
    """Learn, measure and save as `train_reward_model` does. `check_trl` has seen the configuration."""
    steps, home = config.train.steps, Path(context.folder.path("trl"))
    if _finished(steps, context):
        return Outcome(steps=steps, finished=True)
    watch = Reports(config, scorer, verdicts, context)
    trainer = make_trainer(config, scorer, verdicts, context, home)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    earlier = get_last_checkpoint(str(home)) if home.is_dir() else None
    if context.rank == 0:
        drop_reports_after(context.folder, int(earlier.rpartition("-")[2]) if earlier else 0)
    context.barrier()
    trainer.train(resume_from_checkpoint=earlier)
    done = int(trainer.state.global_step)
    if done < steps:
        return Outcome(steps=done, finished=False)
    learner = _learner(config, scorer, context)
    finished = exported(learner, verdicts, config, context)
    context.report(steps, measure(steps, finished, verdicts, config, context))
    Checkpoints(context, config.train.keep_checkpoints).save(steps, learner, saver(finished))
    return Outcome(steps=steps, finished=True)


def check_trl(config: RewardModelConfig) -> None:
    """Raises MissingExtra without trl, ConfigError for keys that its trainer would not heed."""
    require_package("trl", "preference", "decoder-only pairs (trainer=trl)")
    cure = "trl's trainer has none of it here; use trainer=fmray"
    if config.engine.kind != "torch":
        raise ConfigError("engine.kind", config.engine.kind, cure)
    if config.optimizer.ema_decay:
        raise ConfigError("optimizer.ema_decay", config.optimizer.ema_decay, cure)
    if not RunFolder.of(config.run).is_local:
        raise ConfigError("run.storage", config.run.storage, "trl writes to local disks; use trainer=fmray")
    micro = config.data.micro_batch_size
    if micro and any(config.data.batch_size // count % micro for count in config.runtime.worker_counts):
        raise ConfigError("data.micro_batch_size", micro, "must divide a worker's rows; or use trainer=fmray")


def make_trainer(
    config: RewardModelConfig, scorer: Scorer, verdicts: Verdicts, context: Context, home: Path
) -> Any:
    """trl's trainer over our model, tokens, optimizer and schedule."""
    if context.device.type == "cpu":  # accelerate imports deepspeed where it is installed
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_BUILD_OPS", "0")
    from trl import RewardConfig, RewardTrainer

    data, train, optimizer = config.data, config.train, config.optimizer
    rows = data.batch_size // context.world_size
    micro = min(rows, data.micro_batch_size or rows)
    arguments = RewardConfig(
        output_dir=str(home),
        max_steps=train.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        max_grad_norm=optimizer.gradient_clipping,
        bf16=config.engine.precision == "bf16",
        gradient_checkpointing=config.engine.activation_checkpointing,
        disable_dropout=config.model.dropout == 0.0,
        max_length=None,  # our tokens are cut already
        seed=config.run.seed,
        use_cpu=context.device.type == "cpu",
        dataloader_pin_memory=context.device.type == "cuda",
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no" if train.checkpoint_every is None else "steps",
        save_steps=train.checkpoint_every or train.steps,
        save_total_limit=train.keep_checkpoints,
        report_to="none",
        disable_tqdm=True,
    )
    adamw = make_adamw(
        learning_groups(scorer.model, config.model, optimizer.lr, optimizer.weight_decay), optimizer
    )
    shares = torch.optim.lr_scheduler.LambdaLR(adamw, partial(schedule_at, optimizer, steps=train.steps))
    return RewardTrainer(
        model=scorer.model,
        args=arguments,
        train_dataset=_pairs(config, scorer, verdicts),
        processing_class=scorer.tokenizer,
        optimizers=(adamw, shares),
    )


def _pairs(config: RewardModelConfig, scorer: Scorer, verdicts: Verdicts) -> Any:
    """Tokenised by us: trl would put an end-of-sequence token behind each text, which a reward is then asked without."""
    rows = token_rows(verdicts.train, scorer.tokenize)
    columns: dict[str, Any] = {
        "chosen_ids": [row[0] for row in rows],
        "rejected_ids": [row[1] for row in rows],
    }
    margin = config.objective.margin
    margins = [margin if verdict.margin is None else verdict.margin for verdict in verdicts.train]
    if any(margins):
        columns["margin"] = margins
    return datasets.Dataset.from_dict(columns)


def _finished(steps: int, context: Context) -> bool:
    """Whether the run folder holds the finished model."""
    good, _ = newest_good(context.folder.filesystem, context.folder.path("checkpoints"))
    return good is not None and int(good.rpartition("-")[2]) >= steps


def _learner(config: RewardModelConfig, scorer: Scorer, context: Context) -> RewardLearner:
    """What our checkpoints save: the trained weights; their optimizer stays trl's."""
    groups = learning_groups(scorer.model, config.model, config.optimizer.lr, config.optimizer.weight_decay)
    engine = TorchEngine(scorer.model, groups, config.optimizer, config.engine, context.device)
    return RewardLearner(scorer, groups, engine, None)


class Reports(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Metrics, evaluations and the wish to stop, between trl's trainer and our context."""

    def __init__(
        self, config: RewardModelConfig, scorer: Scorer, verdicts: Verdicts, context: Context
    ) -> None:
        self._config = config
        self._scorer = scorer
        self._verdicts = verdicts
        self._context = context
        self._mark = time.perf_counter()
        self._seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._seconds = time.perf_counter() - self._mark
        done, last = state.global_step, state.global_step >= self._config.train.steps
        if not last and self._context.stop_requested():
            control.should_save = control.should_training_stop = True
        elif not last and due(done, self._config.train.evaluate_every):
            found = measure(done, self._scorer, self._verdicts, self._config, self._context)
            self._context.report(done, found)
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        metrics = {ours: float(logs[theirs]) for theirs, ours in RENAMED.items() if theirs in logs}
        speed = {
            "time/step": self._seconds,
            "train/samples_per_second": self._config.data.batch_size / self._seconds,
        }
        self._context.report(state.global_step, metrics | speed)
