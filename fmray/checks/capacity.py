"""What a cluster can hold at its largest, and whether replicas fit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

SUFFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3} | {
    letter + binary: (1024.0 if binary else 1000.0) ** power
    for power, letter in enumerate("KMGTPE", 1)
    for binary in ("", "i")
    if letter + binary != "K"
}
"""Of Kubernetes' quantities: `500m` is 0.5, `16Gi` is 16·2³⁰."""

QUANTITY = r"^[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?$"


def quantity(value: object) -> float | None:
    """A Kubernetes quantity as a number; None: it is none."""
    text = str(value)
    if isinstance(value, bool) or not re.match(QUANTITY, text):
        return None
    digits = re.match(r"[+-]?[\d.]+([eE][+-]?\d+)?", text)
    assert digits is not None
    return float(digits.group()) * SUFFIXES.get(text[digits.end() :], 1.0)


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Equal nodes. `NodeGroup("workerGroupSpecs[0]", count=4, cpus=8, gpus=1)`; None: no limit is known."""

    name: str
    count: float
    """Most nodes of this kind."""
    cpus: float | None = None
    gpus: float | None = None
    memory: float | None = None
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Replica:
    """What one replica reserves. `Replica(cpus=4, gpus=0.5)`; Ray's default is one CPU."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: float = 0.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """All groups of a cluster."""

    groups: tuple[NodeGroup, ...]

    @property
    def gpus(self) -> float:
        """GPUs at its largest; infinity where a group does not say."""
        return sum(
            group.count * group.gpus if group.gpus is not None else math.inf
            for group in self.groups
            if group.count
        )

    def holds(self, replica: Replica, per_node: float | None = None) -> float:
        """How many replicas of one kind fit when nothing else runs."""
        most = 0.0
        for group in self.groups:
            on_one = min(
                _times(group.cpus, replica.cpus),
                _on_gpus(group.gpus, replica.gpus),
                _times(group.memory, replica.memory),
                math.inf if per_node is None else per_node,
            )
            most += group.count * on_one if group.count and on_one else 0.0
        return most

    def largest(self) -> str:
        """What its biggest nodes have, in words."""
        cpus = max((group.cpus for group in self.groups if group.cpus is not None), default=None)
        gpus = max((group.gpus for group in self.groups if group.gpus is not None), default=None)
        parts = [f"{cpus:g} CPUs"] if cpus is not None else []
        parts += [f"{gpus:g} GPUs"] if gpus is not None else []
        return " and ".join(parts) or "no known size"


def _times(has: float | None, needs: float) -> float:
    return math.inf if has is None or needs <= 0 else math.floor(has / needs + 1e-9)


def _on_gpus(has: float | None, needs: float) -> float:
    """Fractions share a GPU, but none spans two."""
    if has is None or needs <= 0:
        return math.inf
    return has * math.floor(1 / needs + 1e-9) if needs < 1 else math.floor(has / needs + 1e-9)
