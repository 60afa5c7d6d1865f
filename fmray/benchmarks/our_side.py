"""fmray's side of the comparisons: a process that answers questions, run as `python -m fmray.benchmarks.our_side`.

The learner is the training room's (`make_learner`, `learn`, `engine.step`), fed by a fixed batch or by the loader.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fmray.benchmarks.open_clip_side.answering import answer_questions
from fmray.benchmarks.workbench import CONTEXT, Sizes, pretrain_config
from fmray.config.schema import PretrainConfig
from fmray.data.loader import PairDataset, PairLoader
from fmray.data.sources import open_source
from fmray.objectives.contrastive import row_keys
from fmray.runtime.context import WorkerContext, prepare_process
from fmray.runtime.run_folder import RunFolder
from fmray.training.engine import rates_at
from fmray.training.grad_cache import GradCache, Outputs, forward_outputs
from fmray.training.loop import Watch, contrastive_loss, learn, make_learner
from fmray.training.pair_learner import PairLearner
from fmray.training.unreadable import Unreadable
from fmray.types import ImageTextBatch

CPU = torch.device("cpu")
MEBIBYTE = 1 << 20


class OurSide:
    """What the questions are put to."""

    config: PretrainConfig
    context: WorkerContext
    learner: PairLearner
    dataset: PairDataset
    batch: ImageTextBatch

    def prepare(self, folder: str, sizes: dict[str, Any]) -> float:
        """Build the learner from `folder`'s checkpoint; returns the loss of batch.safetensors."""
        bench = Sizes(**sizes | {"chunks": tuple(sizes["chunks"])})
        self.config = pretrain_config(Path(folder), bench)
        self.context = WorkerContext(0, 1, CPU, RunFolder.of(self.config.run))
        prepare_process(self.config.runtime)
        tensors = load_file(Path(folder, "batch.safetensors"))
        pixels, ids, mask = (tensors[name] for name in ("pixels", "token_ids", "mask"))
        self.batch = ImageTextBatch(pixels, ids, mask, row_keys(len(pixels), CPU))
        self.fresh()
        return self.loss_of_batch()

    def fresh(self, **data: Any) -> None:
        """The starting weights again, an optimizer without a past, an empty cache; keys of `data` changed."""
        config = self.config.replace(data=self.config.data.replace(**data))
        self.learner, self.dataset = make_learner(
            config, open_source(config.data.source, "train"), self.context
        )

    def loss_of_batch(self) -> float:
        """InfoNCE of the fixed batch with the weights as they are."""
        with torch.no_grad():
            outputs = forward_outputs(self.learner.engine, self.batch)
            return float(contrastive_loss(outputs, self.batch, self.config.objective))

    def steps(self, count: int) -> dict[str, Any]:
        """`count` steps on the fixed batch: seconds per step, and the loss after them."""
        started = time.perf_counter()
        for step in range(count):
            learn(self.learner, self.batch, self.config, self.context, step)
            self._step(step)
        seconds = (time.perf_counter() - started) / count
        return {"seconds": seconds, "loss": self.loss_of_batch()}

    def files(self, epochs: int, pad: bool, keep: bool, augment: bool = True) -> dict[str, Any]:
        """Whole epochs from the picture files: seconds and pictures. `pad`: captions to the context; `keep`: decoded pictures."""
        changes: dict[str, Any] = {} if keep else {"cache_decoded": 0}
        self.fresh(**changes | ({} if augment else {"augment": {}}))
        self.dataset.pad_to = CONTEXT if pad else None
        rows = self.config.data.batch_size
        steps = epochs * (len(self.dataset.source) // rows)
        started = time.perf_counter()
        watch = Watch(rows, Unreadable(0.0))
        tokens = 0
        for step, loaded in PairLoader(self.dataset, 0, 1).batches(0, steps):
            watch.data_arrived()
            batch = replace(loaded.rows, caption_key_B=row_keys(rows, CPU))
            loss, outputs = learn(self.learner, batch, self.config, self.context, step)
            self._step(step)
            watch.metrics(loss, outputs, batch, loaded, self.context)
            watch.step_ended()
            tokens += batch.token_ids_BT.shape[1]
        return {"seconds": time.perf_counter() - started, "pictures": steps * rows, "tokens": tokens / steps}

    def chunked(self, rows: int, chunk: int, cached: bool) -> float:
        """Seconds of one step over `rows` rows in chunks: GradCache, or micro-batches with a loss of their own each."""
        batch = self._batch_of(rows)
        started = time.perf_counter()
        if cached:
            GradCache(self.learner.engine, self._loss_of, chunk).backward(batch, noise_seed=0)
        else:
            parts = [slice(start, start + chunk) for start in range(0, rows, chunk)]
            for part in parts:
                outputs = forward_outputs(self.learner.engine, batch.rows(part))
                loss = self._loss_of(outputs, batch.rows(part)) / len(parts)
                self.learner.engine.backward(loss, last=part is parts[-1])
        self._step(0)
        return time.perf_counter() - started

    def memory(self, rows: int, chunk: int | None) -> float:
        """MiB by which a step over `rows` rows raises the process's peak; ask a fresh process, after one small step."""
        self.chunked(
            min(rows, 8), min(rows, 8), cached=False
        )  # moments and the library's own buffers are there
        batch = self._batch_of(rows)
        before = _reset_peak()
        outputs: Outputs
        if chunk is None:
            outputs = forward_outputs(self.learner.engine, batch)
            self.learner.engine.backward(self._loss_of(outputs, batch))
        else:
            GradCache(self.learner.engine, self._loss_of, chunk).backward(batch, noise_seed=0)
        return (_status("VmHWM") - before) / MEBIBYTE

    def _batch_of(self, rows: int) -> ImageTextBatch:
        """The fixed batch, repeated."""
        times = -(-rows // len(self.batch))

        def repeated(values: Tensor) -> Tensor:
            return torch.cat([values] * times)[:rows]

        batch = self.batch
        return ImageTextBatch(
            repeated(batch.pixels_BCHW),
            repeated(batch.token_ids_BT),
            repeated(batch.mask_BT),
            row_keys(rows, CPU),
        )

    def _loss_of(self, outputs: Outputs, rows: ImageTextBatch) -> Tensor:
        return contrastive_loss(outputs, rows, self.config.objective)

    def _step(self, step: int) -> None:
        self.learner.engine.step(
            rates_at(self.learner.groups, self.config.optimizer, step, self.config.train.steps)
        )


def _reset_peak() -> int:
    """Forget the peak so far; bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(key: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Answer until standard input ends."""
    side = OurSide()
    answers = {name: getattr(side, name) for name in ("prepare", "steps", "files", "chunked", "memory")}
    answer_questions(answers)


if __name__ == "__main__":
    main()
