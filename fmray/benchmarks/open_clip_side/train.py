"""open_clip's side of the comparison, run by the peer environment's Python: its model, its data set, its own training loop.

Nothing of fmray is imported. `train_one_epoch` and `get_csv_dataset` are open_clip_train's, called as its `main` calls them.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torchvision_without_kernels  # noqa: F401 (before open_clip, which imports torchvision)
from answering import answer_questions
from safetensors.torch import load_file

import open_clip  # isort: skip
from open_clip.loss import ClipLoss  # isort: skip
from open_clip.model import CLIP  # isort: skip
from open_clip.tokenizer import SimpleTokenizer  # isort: skip
from open_clip_train.data import DataInfo, get_csv_dataset  # isort: skip
from open_clip_train.train import train_one_epoch  # isort: skip


class OneBatch:
    """The same tensors at every step, as a loader of `count` batches."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor, count: int) -> None:
        self.batch, self.count = (images, texts), count
        self.num_batches, self.num_samples = count, count * len(images)

    def __iter__(self) -> Any:
        return iter([self.batch] * self.count)


class Side:
    """What the questions are put to."""

    def words(self, folder: str) -> dict[str, Any]:
        """Write the tokenizer's vocabulary and merges, so that both sides read the same ids; returns versions."""
        tokenizer = SimpleTokenizer()
        words = {"ids": tokenizer.encoder, "merges": list(tokenizer.bpe_ranks)}
        Path(folder, "vocabulary.json").write_text(json.dumps(words), encoding="utf-8")
        return {name: metadata.version(name) for name in ("open_clip_torch", "torch", "torchvision")}

    def prepare(
        self, folder: str, model: dict[str, Any], optimizer: dict[str, Any], batch_size: int, threads: int
    ) -> float:
        """Build the towers with the weights in `folder`, and main's AdamW; returns the loss of batch.safetensors."""
        torch.set_num_threads(threads)
        self.folder, self.sizes, self.optimizer_keys = Path(folder), model, optimizer
        self.args = Namespace(
            device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, horovod=False,
            grad_clip_norm=optimizer["clip"], log_every_n_steps=100, rank=0, local_rank=0, world_size=1, log_local=False,
            wandb=False, batch_size=batch_size, distributed=False,
        )  # fmt: skip
        self.fresh()
        tensors = load_file(self.folder / "batch.safetensors")
        self.images, self.texts = tensors["normalized"], tensors["token_ids"]
        return self.loss_of_batch()

    def fresh(self) -> None:
        """The starting weights again, and an optimizer without a past."""
        self.model = CLIP(**self.sizes, output_dict=True)
        self.model.load_state_dict(load_file(self.folder / "open_clip.safetensors"))
        self.model.train()
        named = list(self.model.named_parameters())
        plain = [
            p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n
        ]
        decayed = [p for _, p in named if not any(p is q for q in plain)]
        keys = self.optimizer_keys
        groups = [
            {"params": plain, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": keys["weight_decay"]},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=keys["lr"], betas=tuple(keys["betas"]), eps=keys["eps"])

    def loss_of_batch(self) -> float:
        """ClipLoss of the fixed batch with the weights as they are."""
        with torch.no_grad():
            return float(ClipLoss()(**self.model(self.images, self.texts)))

    def steps(self, count: int) -> dict[str, Any]:
        """`count` steps on the fixed batch: seconds per step, and the loss after them."""
        seconds = self.epoch(DataInfo(OneBatch(self.images, self.texts, count)), 0) / count
        return {"seconds": seconds, "loss": self.loss_of_batch()}

    def files(self, table: str, epochs: int, workers: int) -> dict[str, Any]:
        """Whole epochs from a CSV of picture files with the default training transform: seconds and pictures."""
        self.fresh()
        side = self.sizes["vision_cfg"]["image_size"]
        preparation = open_clip.image_transform(
            side, is_train=True, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
        )
        self.args.train_data, self.args.workers = table, workers
        self.args.csv_img_key, self.args.csv_caption_key, self.args.csv_separator = "filepath", "title", "\t"
        data = get_csv_dataset(self.args, preparation, is_train=True, tokenizer=SimpleTokenizer())
        seconds = sum(self.epoch(data, epoch) for epoch in range(epochs))
        return {"seconds": seconds, "pictures": epochs * len(data.dataloader) * self.args.batch_size}

    def epoch(self, data: Any, epoch: int) -> float:
        """One call of open_clip_train's loop; seconds."""
        started = time.perf_counter()
        train_one_epoch(
            self.model, {"train": data}, ClipLoss(), epoch, self.optimizer, None, None, None, self.args
        )
        return time.perf_counter() - started


if __name__ == "__main__":
    side = Side()
    answer_questions({"words": side.words, "prepare": side.prepare, "steps": side.steps, "files": side.files})
