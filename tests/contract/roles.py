"""Roles for the tests of pools: plain classes, as real ones are."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fmray.errors import ConfigError, RewardError
from fmray.runtime.pool import Place
from fmray.runtime.weights import Bucket, bucket_checksum, combined_checksum


@dataclass(frozen=True, slots=True)
class Samples:
    """What a request carries: tokens, pixels, and the seed of the noise."""

    ids_BT: Tensor
    pixels_BCHW: Tensor
    seed: int = 0


class Player:
    """A role with everything a real one has: weights from the store, answers that are functions of the request."""

    def __init__(self, folder: str | None, place: Place) -> None:
        self.place = place
        self.folder = Path(folder or ".")
        self.loaded: int | None = None
        self.checksum = 0
        if (newest := place.weights.newest()) is not None:
            self.load(newest)

    def load(self, version: int) -> int:
        published, buckets = self.place.weights.fetch(version)
        copies: list[Bucket] = [{name: t.clone() for name, t in bucket.items()} for bucket in buckets]
        self.checksum = combined_checksum(bucket_checksum(bucket) for bucket in copies)
        assert self.checksum == published.checksum
        self.loaded = version
        return self.checksum

    def version(self, _: None) -> int | None:
        return self.loaded

    def pid(self, _: object) -> int:
        return os.getpid()

    def device(self, _: None) -> str:
        return str(self.place.device)

    def threads(self, _: None) -> int:
        return torch.get_num_threads()

    def double(self, number: int) -> int:
        return 2 * number

    def sample(self, request: Samples) -> Tensor:
        """Noise of the request's seed over its tokens: bits that any replica gives alike."""
        noise = torch.rand(request.ids_BT.shape, generator=torch.Generator().manual_seed(request.seed))
        return noise * request.ids_BT + request.pixels_BCHW.float().mean()

    def echo(self, request: Samples) -> Samples:
        return request

    def spoil(self, request: Samples) -> int:
        """Writes on what it was sent, as a careless role might; the sum of what it found."""
        found = int(request.ids_BT.sum())
        request.ids_BT.zero_()
        return found

    def nap(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    def die_once(self, name: str) -> int:
        """The first who is asked leaves a file and dies; a later one answers."""
        mark = self.folder / name
        if not mark.exists():
            mark.write_text("died")
            os.kill(os.getpid(), 9)
        return os.getpid()

    def die(self, _: None) -> None:
        os.kill(os.getpid(), 9)

    def refuse(self, sample: str) -> None:
        raise RewardError(f"reward grammar: no score for {sample!r}")

    def misuse(self, key: str) -> None:
        raise ConfigError(key, -1, "must be positive")

    def stumble(self, _: None) -> None:
        raise KeyError("not there")

    def run_out_of_time(self, _: None) -> None:
        raise TimeoutError("the scorer's server did not answer")


class Unbuildable:
    """A role whose model id is wrong."""

    def __init__(self, model: str, place: Place) -> None:
        raise ConfigError("reward.model", model, "no such model")

    def score(self, _: None) -> float:
        return 0.0


class BuildableOnce:
    """Can be built while its mark is not there: a model that is gone when the replica is to be rebuilt."""

    def __init__(self, mark: str, place: Place) -> None:
        if Path(mark).exists():
            raise ConfigError("reward.model", "gone", "no such model")
        Path(mark).write_text("built")

    def die(self, _: None) -> None:
        os.kill(os.getpid(), 9)


class SlowToBuild:
    """Takes longer to build than a test will wait."""

    def __init__(self, seconds: float, place: Place) -> None:
        time.sleep(seconds)


def ended(pid: int, seconds: float = 30.0) -> bool:
    """Whether a process ends in this time."""
    deadline = time.monotonic() + seconds
    while (there := Path(f"/proc/{pid}").exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not there
