"""The peer of `fmray benchmark vqa`: the same VqaModel in transformers' Trainer, row by row as its users write it.

A sample is a picture, a question, an answer. The collator pads; a batch's rows know nothing of each other, so both towers run on
every row, and all logits are made. To the peer's advantage the dataset holds decoded pictures and token ids.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from fmray.config.schema import OptimizerConfig
from fmray.data.dialogue_loader import decoded_pictures
from fmray.data.dialogues import DialogueSource
from fmray.errors import require_package
from fmray.models.vqa import VqaModel
from fmray.models.vqa_answering import VqaAnswering
from fmray.types import Dialogue

Sample = dict[str, Tensor]


class Questions(Dataset[Sample]):
    """One row per question: `pixel_values` uint8 [3, S, S], `input_ids` int64 [S], `labels` int64 [T]."""

    def __init__(
        self, dialogues: Sequence[Dialogue], source: DialogueSource, answering: VqaAnswering
    ) -> None:
        read = decoded_pictures(source, [d.pictures[0] for d in dialogues], answering.image)
        assert read.pixels_NCHW is not None
        picture_of = dict(zip(read.keys, read.pixels_NCHW, strict=True))
        config = answering.model.config
        self._rows = []
        for dialogue in dialogues:
            question = answering.question_tokenizer(
                dialogue.question, truncation=True, max_length=config.max_question_tokens
            )
            answer = answering.answer_tokenizer(dialogue.turns[0].answer, add_special_tokens=False)
            words = answer["input_ids"][: config.max_answer_tokens - 1]
            self._rows.append(
                {
                    "pixel_values": picture_of[dialogue.pictures[0]],
                    "input_ids": torch.tensor(question["input_ids"]),
                    "labels": torch.tensor([config.start_id, *words, config.end_id]),
                }
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        return self._rows[row]


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads questions and answers to the batch's longest, and writes the masks."""

    question_pad: int
    answer_pad: int

    def __call__(self, samples: list[Sample]) -> Sample:
        ids = [sample["input_ids"] for sample in samples]
        labels = [sample["labels"] for sample in samples]
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.question_pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "decoder_input_ids": pad_sequence(labels, batch_first=True, padding_value=self.answer_pad),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


class _Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """When each step ended."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended.append(time.perf_counter())


@dataclass(frozen=True, slots=True)
class TrainerLoop:
    """`TrainerLoop(answering, model, optimizer, "bf16", folder)`: every call trains a copy of the model as it was."""

    answering: VqaAnswering
    """Whose tokenizers are read."""
    model: VqaModel
    """Its locked parts have `requires_grad` off, and VqaModel keeps them in evaluation mode: no graph, no dropout there."""
    optimizer: OptimizerConfig
    precision: str
    folder: Path

    def loss(self, questions: Questions) -> tuple[float, float]:
        """Loss of one batch of all these questions, and its gradient's norm before clipping, as the first step logs them."""
        trainer = self._trainer(questions, len(questions), steps=1, log=True)
        trainer.train()
        first = trainer.state.log_history[0]
        return float(first["loss"]), float(first["grad_norm"])

    def seconds(self, questions: Questions, batch: int, *, warm: int, steps: int) -> float:
        """Of `steps` optimizer steps, `warm` (at least 1) before them not counted; questions in an order of Trainer's own."""
        trainer = self._trainer(questions, batch, steps=warm + steps)
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.train()
        return clock.ended[-1] - clock.ended[warm - 1]

    def _trainer(self, questions: Questions, batch: int, *, steps: int, log: bool = False) -> Any:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports deepspeed where it is installed
        os.environ.setdefault("DS_BUILD_OPS", "0")
        from transformers import Trainer, TrainingArguments

        model = copy.deepcopy(self.model)
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=batch,
            max_steps=steps,
            bf16=self.precision == "bf16",
            use_cpu=True,
            optim="adamw_torch_fused",
            learning_rate=self.optimizer.lr,
            weight_decay=self.optimizer.weight_decay,
            adam_beta1=self.optimizer.betas[0],
            adam_beta2=self.optimizer.betas[1],
            adam_epsilon=self.optimizer.eps,
            max_grad_norm=self.optimizer.gradient_clipping,
            lr_scheduler_type="constant",
            logging_strategy="steps" if log else "no",
            logging_steps=1,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_drop_last=not log,
            remove_unused_columns=False,
        )
        collator = Collator(self.answering.question_tokenizer.pad_token_id or 0, model.config.end_id)
        trainer = Trainer(model=model, args=arguments, train_dataset=questions, data_collator=collator)
        trainer.remove_callback(PrinterCallback)  # standard output is the table's
        return trainer


def peer_versions() -> dict[str, str]:
    """What the Trainer's loop stands on; raises MissingExtra without accelerate, which it asks for and peft brings."""
    require_package("accelerate", "lora", "benchmark vqa")
    return {name: version(name) for name in ("torch", "transformers", "accelerate")}
