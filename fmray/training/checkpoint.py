"""Checkpoints that a killed run resumes from, bit for bit, on any engine, ZeRO stage and number of ranks.

checkpoints/step-00000100/
    model/                              what `from_pretrained` loads and an endpoint serves
    state/tensors-00000.safetensors …   fp32 weights, Adam's moments and the average by parameter name; each rank writes its share
    state/memory-00000.json …           what each rank remembers beside them, with .safetensors where it holds tensors
    state/trainer.json                  the step
    manifest.json                       sizes and SHA-256 of all of them, written last: without it the folder does not count

Data order, noise and schedules are functions of (seed, step, rank), so most learners remember nothing. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fmray.errors import CheckpointError
from fmray.manifest import MANIFEST, FileSum, manifest_text, newest_good, step_folders, sum_file
from fmray.models.freezing import ParameterGroup
from fmray.runtime.context import Context
from fmray.runtime.metrics import drop_reports_after
from fmray.training.averaging import WeightAverage
from fmray.training.engine import Engine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Memory:
    """What one rank remembers beside weights and moments.

    `Memory({"kl_coefficient": 0.05}, {"sample_id": torch.arange(4)})`
    """

    values: dict[str, Any] = field(default_factory=dict)
    """Anything JSON can hold."""
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Learner(Protocol):
    """Everything that changes while learning."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def groups(self) -> list[ParameterGroup]: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def average(self) -> WeightAverage | None: ...

    def remember(self) -> Memory:
        """This rank's memory, to be written."""
        ...

    def recall(self, memories: list[Memory]) -> None:
        """All ranks' memories, as they were written by perhaps more or fewer ranks."""
        ...


SaveModel = Callable[[Path], None]
"""Writes the model that `from_pretrained` loads into a folder; called on rank 0 alone."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run; every method is called by all ranks."""

    context: Context
    keep: int

    @property
    def _root(self) -> str:
        return self.context.folder.path("checkpoints")

    def save(self, step: int, learner: Learner, save_model: SaveModel) -> None:
        """Write a checkpoint after `step` steps; raises CheckpointError and keeps the older ones if it cannot."""
        name = f"step-{step:08d}"
        if self.context.rank == 0:
            self.context.folder.remove("checkpoints", name)  # an unfinished attempt
        self.context.barrier()
        failure, sums = "", []
        shares = _share_of(learner, self.context.rank, self.context.world_size)
        try:
            with self._staged(name) as stage:
                sums = self._write(stage, step, save_model, shares, learner.remember())
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            failure = f"{'the disk is full' if full else error.strerror or error} ({self.context.folder.url})"
        except SafetensorError as error:  # its writer wraps the operating system's error in a text
            failure = (
                f"{'the disk is full' if 'os error 28' in str(error) else error} ({self.context.folder.url})"
            )
        told = [json.loads(text) for text in self.context.gather_texts(_as_json(failure, sums))]
        failures = [told_failure for told_failure, _ in told if told_failure]
        if failures:
            self._give_up(name, step, failures[0])
        if self.context.rank == 0:
            files = [FileSum(*entry) for _, entries in told for entry in entries]
            self.context.folder.write_text(manifest_text(step, files), "checkpoints", name, MANIFEST)
            self._forget_old(name)
        self.context.barrier()

    def _write(
        self, stage: Path, step: int, save_model: SaveModel, shares: dict[str, Tensor], memory: Memory
    ) -> list[FileSum]:
        """This rank's files and their sums."""
        state, rank = stage / "state", self.context.rank
        state.mkdir(parents=True, exist_ok=True)
        written = [state / f"tensors-{rank:05d}.safetensors", state / f"memory-{rank:05d}.json"]
        save_file(shares, written[0])
        written[1].write_text(json.dumps(memory.values) + "\n", encoding="utf-8")
        if memory.tensors:
            written.append(state / f"memory-{rank:05d}.safetensors")
            save_file(memory.tensors, written[-1])
        if self.context.rank == 0:
            (stage / "model").mkdir(exist_ok=True)
            save_model(stage / "model")
            trainer = {"step": step, "world_size": self.context.world_size}
            (state / "trainer.json").write_text(json.dumps(trainer) + "\n", encoding="utf-8")
            written += [*(stage / "model").rglob("*"), state / "trainer.json"]
        return [sum_file(path, stage) for path in written if path.is_file()]

    @contextmanager
    def _staged(self, name: str) -> Iterator[Path]:
        """A local folder to write into: the checkpoint's own, or one that is uploaded afterwards."""
        folder = self.context.folder
        target = folder.path("checkpoints", name)
        if folder.is_local:
            yield Path(target)
            return
        with tempfile.TemporaryDirectory() as local:
            yield Path(local)
            folder.filesystem.put(f"{local}/", f"{target}/", recursive=True)

    def _give_up(self, name: str, step: int, reason: str) -> None:
        if self.context.rank == 0:
            self.context.folder.remove("checkpoints", name)
        good, _ = (
            newest_good(self.context.folder.filesystem, self._root) if self.context.rank == 0 else (None, [])
        )
        left = f"; the last good one is {good}" if good else ""
        raise CheckpointError(f"checkpoint of step {step} could not be saved: {reason}{left}")

    def _forget_old(self, newest: str) -> None:
        """Delete what is older than the last `keep`, and unfinished folders."""
        filesystem = self.context.folder.filesystem
        finished: list[str] = []
        for folder in step_folders(filesystem, self._root):
            if filesystem.exists(f"{folder}/{MANIFEST}") and len(finished) < self.keep:
                finished.append(folder)
            elif not folder.endswith(newest):
                filesystem.rm(folder, recursive=True)

    def resume(self, learner: Learner) -> int:
        """Load the newest checkpoint that verifies; returns the number of steps done, 0 where there is none."""
        choice = ""
        if self.context.rank == 0:
            good, passed_over = newest_good(self.context.folder.filesystem, self._root)
            for reason in passed_over:
                log.warning("checkpoint passed over: %s", reason)
            choice = good or ""
        choice = self.context.gather_texts(choice)[0]
        if not choice:
            self._forget_reports(after=0)
            return 0
        with self._local_copy(choice) as folder:
            step = int(json.loads((folder / "state" / "trainer.json").read_text(encoding="utf-8"))["step"])
            _load_tensors(folder / "state", learner)
            learner.engine.load_step(step)
            learner.recall(_memories(folder / "state"))
        self._forget_reports(after=step)
        return step

    def _forget_reports(self, after: int) -> None:
        """What a killed run reported beyond its checkpoint will be reported again."""
        if self.context.rank == 0:
            drop_reports_after(self.context.folder, after)
        self.context.barrier()

    @contextmanager
    def _local_copy(self, checkpoint: str) -> Iterator[Path]:
        if self.context.folder.is_local:
            yield Path(checkpoint)
            return
        local = tempfile.mkdtemp()
        try:
            self.context.folder.filesystem.get(f"{checkpoint}/state/", f"{local}/state/", recursive=True)
            yield Path(local)
        finally:
            shutil.rmtree(local)


def _as_json(failure: str, sums: list[FileSum]) -> str:
    return json.dumps([failure, [[f.path, f.size, f.sha256] for f in sums]])


def _share_of(learner: Learner, rank: int, world_size: int) -> dict[str, Tensor]:
    """Every world_size-th parameter's tensors; all ranks go through all of them, since gathering needs all."""
    mine: dict[str, Tensor] = {}
    for index, (name, tensors) in enumerate(learner.engine.tensors()):
        if learner.average is not None:
            tensors["average"] = learner.average.whole(name)
        if index % world_size == rank:
            mine |= {f"{name}|{key}": tensor.contiguous().clone() for key, tensor in tensors.items()}
    return mine


def _memories(folder: Path) -> list[Memory]:
    """What the ranks that wrote the checkpoint remembered, in their order."""
    memories = []
    for path in sorted(folder.glob("memory-*.json")):
        tensors = path.with_suffix(".safetensors")
        memories.append(
            Memory(
                json.loads(path.read_text(encoding="utf-8")), load_file(tensors) if tensors.exists() else {}
            )
        )
    return memories


def _load_tensors(folder: Path, learner: Learner) -> None:
    """Put the tensors of all files into the learner; raises CheckpointError where they are another model's."""
    readers: dict[str, tuple[Callable[[str], Tensor], list[str]]] = {}
    for path in sorted(folder.glob("tensors-*.safetensors")):
        opened = safe_open(path, framework="pt")
        for key in opened.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118 (not a dict)
            name, _, kind = key.rpartition("|")
            readers.setdefault(name, (opened.get_tensor, []))[1].append(kind)
    wanted = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
    if wanted.keys() != readers.keys():
        odd = sorted(wanted.keys() ^ readers.keys())[0]
        raise CheckpointError(f"{folder}: is of another model or another freezing: it differs in {odd}")
    for name in wanted:
        get, kinds = readers[name]
        # copies: the tensors are the mapped file, which may change or go while the optimizer still holds them
        tensors = {kind: get(f"{name}|{kind}").clone() for kind in kinds}
        shape = tuple(getattr(wanted[name], "ds_shape", wanted[name].shape))
        if tuple(tensors["weight"].shape) != shape:
            raise CheckpointError(
                f"{folder}: is of another model: {name} has shape {tuple(tensors['weight'].shape)}, not {shape}"
            )
        averaged = tensors.pop("average", None)
        learner.engine.load_tensors(name, tensors)
        if learner.average is not None:
            learner.average.load(name, tensors["weight"] if averaged is None else averaged)
