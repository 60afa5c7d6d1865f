"""The weights that pools load, kept by an actor that outlives the learners. Imports ray; knows no room.

The shelf, an actor of the driver's, keeps each version in one piece of memory that other processes of its node map: the learner
writes there what replicas read from there, so a version is copied once, belongs to nobody who may die, and the same pages serve
every other version. (Ray's own objects die with the process that put them, and new pages cost several times the copying.) What
runs on other nodes sends and gets its buckets through Ray.
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.exceptions
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from fmray.errors import PoolError
from fmray.runtime.ray_tensors import Bytes, bytes_of
from fmray.runtime.weights import Bucket, Published, bucket_checksum, combined_checksum, missing_version

NAMESPACE = "fmray"
ALIGNMENT = 64
"""Bytes at whose multiples a tensor starts."""
IN_FLIGHT = 2
"""Buckets on their way from another node at once."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Memory for one version: who can open `path` on `node` shares it."""

    node: str
    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the slot a tensor lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


Layout = tuple[Position, ...]
"""Of one bucket."""


@dataclass(slots=True)
class Kept:
    """A version on the shelf."""

    published: Published
    path: str
    layouts: list[Layout]
    objects: list[Any] | None = None
    """The buckets as Ray objects, once another node has asked for them."""


class Shelf:
    """The actor."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._versions: dict[int, Kept] = {}
        self._node = ray.get_runtime_context().get_node_id()
        self._memory: dict[str, int] = {}  # open files without a name, by their paths: gone with this process

    def begin(self) -> Slot:
        """A slot that no kept version lies in."""
        taken = {kept.path for kept in self._versions.values()}
        free = [path for path in self._memory if path not in taken]
        if not free:
            memory = os.memfd_create("weights")
            os.ftruncate(memory, max((self._slot(path).size for path in self._memory), default=0))
            free = [f"/proc/{os.getpid()}/fd/{memory}"]
            self._memory[free[0]] = memory
        return self._slot(free[0])

    def grow(self, path: str, size: int) -> Slot:
        os.ftruncate(self._memory[path], size)
        return self._slot(path)

    def write(self, path: str, layout: Layout, arrays: dict[str, Bytes]) -> None:
        """A bucket from another node."""
        memory = _mapped(self._memory[path], mmap.MAP_SHARED)
        for position in layout:
            memory[position.start : position.end] = torch.from_numpy(arrays[position.name].copy())

    def seal(self, published: Published, path: str, layouts: list[Layout]) -> None:
        """The version is whole. Later ones are of a future that a resumed run has not reached: they go."""
        earlier = sorted(version for version in self._versions if version < published.version)
        kept = earlier[max(0, len(earlier) + 1 - self._keep) :]
        self._versions = {version: self._versions[version] for version in kept}
        self._versions[published.version] = Kept(published, path, layouts)

    def held(self) -> list[int]:
        return sorted(self._versions)

    def find(self, version: int) -> tuple[Published, Slot, list[Layout]] | None:
        kept = self._versions.get(version)
        return None if kept is None else (kept.published, self._slot(kept.path), kept.layouts)

    def objects(self, version: int) -> list[Any] | None:
        """The version's buckets for another node, put once."""
        kept = self._versions.get(version)
        if kept is None:
            return None
        if kept.objects is None:
            memory = _mapped(self._memory[kept.path], mmap.MAP_SHARED)
            kept.objects = [ray.put(bytes_of(memory[slice(*_range(layout))])) for layout in kept.layouts]
        return kept.objects

    def _slot(self, path: str) -> Slot:
        return Slot(self._node, path, os.fstat(self._memory[path]).st_size)


class RayWeightStore:
    """`WeightStore` over a shelf; picklable, every process asks for itself. Raises PoolError where the shelf does not answer."""

    def __init__(self, keep: int, timeout_seconds: float) -> None:
        # on the driver's node: without that one the run is over anyway, and a lost learner's node loses no weights
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        name = f"weights-{uuid.uuid4().hex}"
        shelf = ray.remote(Shelf).options(
            name=name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here
        )
        self._open(name, timeout_seconds, shelf.remote(keep))

    def _open(self, name: str, timeout_seconds: float, shelf: Any) -> None:
        self._name, self._timeout, self._shelf = name, timeout_seconds, shelf
        self._node = ray.get_runtime_context().get_node_id()
        self._mapped: dict[tuple[Slot, int], Tensor] = {}  # kept: mapping anew costs as much as copying

    def __getstate__(self) -> tuple[str, float]:
        return (
            self._name,
            self._timeout,
        )  # no handle: Ray warns of actors that could not be restarted without it

    def __setstate__(self, state: tuple[str, float]) -> None:
        self._open(*state, ray.get_actor(state[0], NAMESPACE))

    def publish(self, version: int, buckets: Iterable[Bucket]) -> Published:
        phase = f"publish version {version}"
        slot: Slot = self._get(self._shelf.begin.remote(), phase)
        layouts: list[Layout] = []
        checksums, sent, size, end = [], list[Any](), 0, 0
        with ThreadPoolExecutor(1) as other_core:
            for bucket in buckets:
                checksum = other_core.submit(bucket_checksum, bucket)
                layouts.append(_layout(bucket, end))
                end = max(end, _range(layouts[-1])[1])
                if end > slot.size:
                    slot = self._get(self._shelf.grow.remote(slot.path, end), phase)
                sent += self._write(slot, layouts[-1], bucket)
                self._get(sent[-IN_FLIGHT - 1 : -IN_FLIGHT], phase)
                checksums.append(checksum.result())
                size += sum(tensor.numel() * tensor.element_size() for tensor in bucket.values())
        published = Published(version, combined_checksum(checksums), size, len(layouts))
        self._get([*sent, self._shelf.seal.remote(published, slot.path, layouts)], phase)
        return published

    def newest(self) -> int | None:
        return max(self._get(self._shelf.held.remote(), "newest version"), default=None)

    def fetch(self, version: int) -> tuple[Published, Iterator[Bucket]]:
        """The tensors lie where versions to come will lie: copy them, compare the checksum, let them go."""
        phase = f"fetch version {version}"
        published, slot, layouts = self._found(self._shelf.find.remote(version), version, phase)
        memory = self._shared(slot, mmap.MAP_PRIVATE)
        if memory is not None:
            return published, (_views(memory, layout, 0) for layout in layouts)
        objects = self._found(self._shelf.objects.remote(version), version, phase)
        if objects:  # all start to travel
            ray.wait(objects, num_returns=len(objects), timeout=0)
        return published, (
            _views(torch.from_numpy(self._get(one, phase).copy()), layout, _range(layout)[0])
            for one, layout in zip(objects, layouts, strict=True)
        )

    def close(self) -> None:
        """End the shelf, and with it the weights."""
        ray.kill(self._shelf)

    def _write(self, slot: Slot, layout: Layout, bucket: Bucket) -> list[Any]:
        """A bucket into the slot; what to wait for, where the slot is on another node."""
        memory = self._shared(slot, mmap.MAP_SHARED)
        if memory is None:
            arrays = {name: bytes_of(tensor.contiguous()) for name, tensor in bucket.items()}
            return [self._shelf.write.remote(slot.path, layout, arrays)]
        for name, view in _views(memory, layout, 0).items():
            view.copy_(bucket[name].detach())
        return []

    def _shared(self, slot: Slot, flags: int) -> Tensor | None:
        """The slot's bytes; None: on another node, or not to be reached from this container."""
        if slot.node != self._node:
            return None
        if (slot, flags) not in self._mapped:
            try:
                memory = os.open(slot.path, os.O_RDWR)
            except OSError:
                return None
            with os.fdopen(memory, "r+b"):
                grown = [old for old in self._mapped if old[0].path == slot.path and old[0].size < slot.size]
                for old in grown:
                    del self._mapped[old]
                self._mapped[slot, flags] = _mapped(memory, flags)
        return self._mapped[slot, flags]

    def _found(self, asked: Any, version: int, phase: str) -> Any:
        found = self._get(asked, phase)
        if found is None:
            raise missing_version(version, self._get(self._shelf.held.remote(), phase))
        return found

    def _get(self, asked: Any, phase: str) -> Any:
        try:
            return ray.get(asked, timeout=self._timeout)
        except ray.exceptions.GetTimeoutError:
            raise PoolError(
                f"weights: no answer from the shelf in {self._timeout:g} s, phase: {phase}"
            ) from None
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            raise PoolError(f"weights: the shelf is lost, phase: {phase}: {last_line(error)}") from None


def last_line(error: BaseException) -> str:
    """What Ray says at the end of a long message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _mapped(memory: int, flags: int) -> Tensor:
    """A file's bytes as a uint8 tensor, which keeps them mapped; private: who writes on it changes nothing for others."""
    size = os.fstat(memory).st_size
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_numpy(np.frombuffer(mmap.mmap(memory, size, flags), dtype=np.uint8))


def _layout(bucket: Bucket, start: int) -> Layout:
    positions = []
    for name, tensor in bucket.items():
        start = -(-start // ALIGNMENT) * ALIGNMENT
        end = start + tensor.numel() * tensor.element_size()
        positions.append(Position(name, tensor.dtype, tuple(tensor.shape), start, end))
        start = end
    return tuple(positions)


def _range(layout: Layout) -> tuple[int, int]:
    return (layout[0].start, layout[-1].end) if layout else (0, 0)


def _views(memory: Tensor, layout: Layout, first: int) -> dict[str, Tensor]:
    """The tensors of a bucket, not copied; `first`: the slot's byte with which the memory begins."""
    return {
        one.name: memory[one.start - first : one.end - first].view(one.dtype).view(one.shape)
        for one in layout
    }
