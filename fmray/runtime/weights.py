"""Weights on their way from the learners to the pools: whole tensors in few large buckets, with version and checksum.

A store keeps the last versions, so that a replica can load whichever version a request names, a rebuilt one too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from fmray.errors import PoolError

Bucket = Mapping[str, Tensor]
"""Whole contiguous CPU tensors by parameter name."""


@dataclass(frozen=True, slots=True)
class Published:
    """`Published(version=3, checksum=0x9f86d081884c7d65, bytes=307_844_608, buckets=5)`"""

    version: int
    checksum: int
    """XXH3 over the buckets' checksums, in order."""
    bytes: int
    buckets: int


class WeightStore(Protocol):
    """The last published versions of the policy's weights."""

    def publish(self, version: int, buckets: Iterable[Bucket]) -> Published:
        """Keep a version, forget the ones beyond the store's size; publishing a version again replaces it.

        Later versions are forgotten too: they are of a future that a resumed run has not reached.
        The buckets are read one after the other and copied: the caller may free or change each after it was taken.
        """
        ...

    def newest(self) -> int | None:
        """The latest version, None before the first."""
        ...

    def fetch(self, version: int) -> tuple[Published, Iterator[Bucket]]:
        """A version's buckets, read-only; raises PoolError where the store no longer, or not yet, has it."""
        ...


def bucket_checksum(bucket: Bucket) -> int:
    """XXH3-64 over names, dtypes, shapes and bytes, in the bucket's order."""
    digest = xxhash.xxh3_64()
    for name, tensor in bucket.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.intdigest()


def combined_checksum(checksums: Iterable[int]) -> int:
    """One number for a version: XXH3-64 over its buckets' checksums."""
    return xxhash.xxh3_64_intdigest(b"".join(value.to_bytes(8, "little") for value in checksums))


def take_version(store: WeightStore, version: int, take: Callable[[Bucket], None]) -> Published:
    """Hand each bucket of a version to `take`, and check while it copies that they are what was published.

    Raises PoolError where they are not: what was taken must then not be used.
    """
    published, buckets = store.fetch(version)
    with ThreadPoolExecutor(1, "checksum") as hashing:
        sums = []
        for bucket in buckets:
            sums.append(hashing.submit(bucket_checksum, bucket))
            take(bucket)
        found = combined_checksum(done.result() for done in sums)
    if found != published.checksum:
        raise PoolError(
            f"weights of version {version} arrived altered: their checksum is {found:016x}, "
            f"published was {published.checksum:016x}"
        )
    return published


def missing_version(version: int, held: Iterable[int]) -> PoolError:
    """The error of a store that was asked for a version it does not hold."""
    there = ", ".join(map(str, sorted(held))) or "none"
    return PoolError(f"weights: version {version} is not in the store (it holds {there})")


class LocalWeightStore:
    """`WeightStore` in this process: copies of the last `keep` versions."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._versions: dict[int, tuple[Published, list[dict[str, Tensor]]]] = {}

    def publish(self, version: int, buckets: Iterable[Bucket]) -> Published:
        # the oldest goes before the newest comes: with keep=1 the model is never twice in here
        kept = sorted(held for held in self._versions if held < version)
        kept = kept[max(0, len(kept) + 1 - self._keep) :]
        self._versions = {held: self._versions[held] for held in kept}
        copies = [{name: tensor.detach().cpu().clone() for name, tensor in b.items()} for b in buckets]
        checksum = combined_checksum(bucket_checksum(bucket) for bucket in copies)
        size = sum(t.numel() * t.element_size() for bucket in copies for t in bucket.values())
        published = Published(version, checksum, size, len(copies))
        self._versions[version] = (published, copies)
        return published

    def newest(self) -> int | None:
        return max(self._versions, default=None)

    def fetch(self, version: int) -> tuple[Published, Iterator[Bucket]]:
        if version not in self._versions:
            raise missing_version(version, self._versions)
        published, buckets = self._versions[version]
        return published, iter(buckets)
