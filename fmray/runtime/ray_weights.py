"""The weights that pools load, kept by an actor that outlives the learners. Imports ray; knows no room.

A Ray object dies with the process that put it, so the shelf, an actor of the driver's, puts each bucket again as it arrives,
while the learner sends the next. A bucket is one flat buffer, which Ray copies several times faster than many arrays.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from fmray.errors import PoolError
from fmray.runtime.ray_tensors import Bytes, bytes_of, tensor_over
from fmray.runtime.weights import Bucket, Published, bucket_checksum, combined_checksum, missing_version

NAMESPACE = "fmray"
ALIGNMENT = 64
"""Bytes at whose multiples a tensor starts in its bucket's buffer."""
IN_FLIGHT = 2
"""Buckets between learner and shelf at once: all that is ever held twice."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one tensor lies in the buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


Layout = tuple[_Slot, ...]


class Shelf:
    """The actor: the last versions, each visible once it is whole."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._versions: dict[int, tuple[Published, list[tuple[Any, Layout]]]] = {}
        self._attempt, self._arriving = "", list[tuple[Any, Layout]]()

    def put(self, attempt: str, buffer: Bytes, layout: Layout) -> None:
        """The next bucket; a new attempt drops what a learner that died had sent of another."""
        if attempt != self._attempt:
            self._attempt, self._arriving = attempt, []
        self._arriving.append((ray.put(buffer), layout))

    def seal(self, attempt: str, published: Published) -> None:
        """The version is whole. Later ones are of a future that a resumed run has not reached: they go."""
        arrived = self._arriving if attempt == self._attempt else []
        earlier = sorted(version for version in self._versions if version < published.version)
        kept = earlier[max(0, len(earlier) + 1 - self._keep) :]
        self._versions = {version: self._versions[version] for version in kept}
        self._versions[published.version] = (published, arrived)
        self._attempt, self._arriving = "", []

    def held(self) -> list[int]:
        return sorted(self._versions)

    def find(self, version: int) -> tuple[Published, list[tuple[Any, Layout]]] | None:
        return self._versions.get(version)


class RayWeightStore:
    """`WeightStore` over a shelf; picklable, every process asks for itself. Raises PoolError where the shelf does not answer."""

    def __init__(self, keep: int, timeout_seconds: float) -> None:
        # on the driver's node: without that one the run is over anyway, and a lost learner's node loses no weights
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._name, self._timeout = f"weights-{uuid.uuid4().hex}", timeout_seconds
        shelf = ray.remote(Shelf).options(
            name=self._name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here
        )
        self._shelf = shelf.remote(keep)
        self._stage = torch.empty(0, dtype=torch.uint8)

    def __getstate__(self) -> tuple[str, float]:
        return (
            self._name,
            self._timeout,
        )  # no handle: Ray warns of actors that could not be restarted without it

    def __setstate__(self, state: tuple[str, float]) -> None:
        self._name, self._timeout = state
        self._shelf = ray.get_actor(self._name, NAMESPACE)
        self._stage = torch.empty(0, dtype=torch.uint8)

    def publish(self, version: int, buckets: Iterable[Bucket]) -> Published:
        attempt, phase = uuid.uuid4().hex, f"publish version {version}"
        sent: list[Any] = []
        checksums, size = [], 0
        for bucket in buckets:
            layout = _layout(bucket)
            sent.append(self._shelf.put.remote(attempt, self._flat(bucket, layout), layout))
            checksums.append(bucket_checksum(bucket))
            size += sum(slot.end - slot.start for slot in layout)
            if len(sent) > IN_FLIGHT:
                self._get(sent[-1 - IN_FLIGHT], phase)
        published = Published(version, combined_checksum(checksums), size, len(sent))
        self._get([*sent[-IN_FLIGHT:], self._shelf.seal.remote(attempt, published)], phase)
        return published

    def newest(self) -> int | None:
        return max(self._get(self._shelf.held.remote(), "newest version"), default=None)

    def fetch(self, version: int) -> tuple[Published, Iterator[Bucket]]:
        """The tensors lie in Ray's shared memory and are for reading: copy them, then let them go."""
        phase = f"fetch version {version}"
        found = self._get(self._shelf.find.remote(version), phase)
        if found is None:
            raise missing_version(version, self._get(self._shelf.held.remote(), phase))
        published, parts = found
        if parts:  # another node's buckets start to travel together
            ray.wait([buffer for buffer, _ in parts], num_returns=len(parts), timeout=0)
        return published, (_bucket(self._get(buffer, phase), layout) for buffer, layout in parts)

    def close(self) -> None:
        """End the shelf, and with it the weights."""
        ray.kill(self._shelf)

    def _flat(self, bucket: Bucket, layout: Layout) -> Bytes:
        """The bucket's bytes in one buffer, which the next bucket takes over: Ray has copied it when the call returns."""
        total = layout[-1].end if layout else 0
        if self._stage.numel() < total:
            self._stage = torch.empty(total, dtype=torch.uint8)
        for slot in layout:
            _view(self._stage, slot).copy_(bucket[slot.name].detach())
        return bytes_of(self._stage[:total])

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


def _layout(bucket: Bucket) -> Layout:
    slots, start = [], 0
    for name, tensor in bucket.items():
        end = start + tensor.numel() * tensor.element_size()
        slots.append(_Slot(name, tensor.dtype, tuple(tensor.shape), start, end))
        start = -(-end // ALIGNMENT) * ALIGNMENT
    return tuple(slots)


def _view(buffer: Tensor, slot: _Slot) -> Tensor:
    return buffer[slot.start : slot.end].view(slot.dtype).view(slot.shape)


def _bucket(buffer: Bytes, layout: Layout) -> dict[str, Tensor]:
    flat = tensor_over(buffer) if buffer.size else torch.empty(0, dtype=torch.uint8)
    return {slot.name: _view(flat, slot) for slot in layout}
