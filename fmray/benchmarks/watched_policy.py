"""The rollout policy with a clock on its weights' arrival."""

from __future__ import annotations

import time
from typing import Any, cast

from fmray.config.rlhf import RlhfConfig
from fmray.models.decoding.generate import Decoder
from fmray.rlhf.roles import RolloutPolicy
from fmray.runtime.pool import Place
from fmray.runtime.weights import bucket_checksum


class WatchedPolicy(RolloutPolicy):
    """It knows when it last held verified weights: just before its decoder reads them anew."""

    def __init__(self, config: RlhfConfig, place: Place) -> None:
        super().__init__(config, place)
        self._clock = _Clock(self._decoder)
        self._decoder = cast(Decoder, self._clock)

    def when_verified(self, _: None) -> float:
        """By the machine's monotonic clock, which all its processes share; seconds."""
        return self._clock.refreshed

    def checksum_seconds(self, version: int) -> float:
        """How long the checksums of a version's buckets take in this replica."""
        _, buckets = self._weights.fetch(version)
        seconds = 0.0
        for bucket in buckets:
            started = time.perf_counter()
            bucket_checksum(bucket)
            seconds += time.perf_counter() - started
        return seconds


class _Clock:
    """A decoder that notes when it is refreshed."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self.refreshed = decoder, 0.0

    def refresh(self) -> None:
        self.refreshed = time.monotonic()
        self._decoder.refresh()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)
