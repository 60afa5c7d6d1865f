"""One contract for weights kept in this process and by Ray's shelf."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from fmray.errors import PoolError
from fmray.runtime.weights import (
    Bucket,
    LocalWeightStore,
    WeightStore,
    bucket_checksum,
    combined_checksum,
)

Open = Callable[[int], WeightStore]


@pytest.fixture(
    params=["local", *(pytest.param(name, marks=pytest.mark.ray) for name in ("ray", "ray, another node"))]
)
def open_store(request: pytest.FixtureRequest) -> Iterator[Open]:
    if request.param == "local":
        yield LocalWeightStore
        return
    request.getfixturevalue("ray_session")
    from fmray.runtime.ray_weights import RayWeightStore

    opened: list[RayWeightStore] = []

    def open_one(keep: int) -> WeightStore:
        opened.append(RayWeightStore(keep, 60.0))
        if request.param != "ray":
            opened[-1]._node = "elsewhere"  # its buckets then travel through Ray
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def buckets(seed: int = 0) -> list[Bucket]:
    """Tied, odd, empty, scalar, bf16 and large tensors."""
    noise = torch.Generator().manual_seed(seed)
    embed = torch.randn(301, 1000, generator=noise)  # more than Ray sends inline
    return [
        {"encoder.embed": embed, "head": embed, "scale": torch.tensor(0.5)},
        {"gate": torch.randn(7, 3, generator=noise).to(torch.bfloat16), "none": torch.empty(0, 4)},
        {"steps": torch.arange(5), "mask": torch.tensor([True, False, True])},
    ]


def fetched(store: WeightStore, version: int) -> list[Bucket]:
    _, found = store.fetch(version)
    return list(found)


def assert_same(found: list[Bucket], sent: list[Bucket]) -> None:
    assert [list(bucket) for bucket in found] == [list(bucket) for bucket in sent]
    for one, other in zip(found, sent, strict=True):
        for name in other:
            assert one[name].dtype == other[name].dtype
            assert one[name].shape == other[name].shape
            assert torch.equal(one[name], other[name])


def test_weights_come_back_bit_for_bit_and_without_a_warning(open_store: Open) -> None:
    store = open_store(1)
    assert store.newest() is None
    published = store.publish(3, iter(buckets()))
    assert (published.version, published.buckets, store.newest()) == (3, 3, 3)
    assert published.bytes == sum(t.numel() * t.element_size() for b in buckets() for t in b.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told, found = store.fetch(3)
        assert_same(list(found), buckets())
    assert told == published


def test_the_checksum_is_of_what_was_sent_and_sees_one_bit(open_store: Open) -> None:
    store = open_store(1)
    published = store.publish(0, buckets())
    found = fetched(store, 0)
    assert combined_checksum(bucket_checksum(bucket) for bucket in found) == published.checksum
    copies = [{name: t.clone() for name, t in bucket.items()} for bucket in found]
    copies[0]["encoder.embed"].view(torch.int32)[150, 500] ^= 1
    assert combined_checksum(bucket_checksum(bucket) for bucket in copies) != published.checksum


def test_what_is_done_to_a_bucket_afterwards_changes_nothing(open_store: Open) -> None:
    store = open_store(1)
    weights = torch.zeros(200_000)

    def one_buffer() -> Iterator[Bucket]:
        for number in range(4):
            weights.fill_(number)  # the same memory for every bucket, as a gathering learner may do
            yield {f"part.{number}": weights}
        weights.fill_(-1)

    store.publish(0, one_buffer())
    assert [float(t.sum()) for b in fetched(store, 0) for t in b.values()] == [
        number * 200_000.0 for number in range(4)
    ]


def test_a_store_keeps_its_last_versions(open_store: Open) -> None:
    store = open_store(2)
    for version in range(4):
        store.publish(version, buckets(version))
    assert store.newest() == 3
    for version in (2, 3):
        assert_same(fetched(store, version), buckets(version))
    with pytest.raises(PoolError, match=r"version 1 is not in the store \(it holds 2, 3\)"):
        store.fetch(1)
    with pytest.raises(PoolError, match="version 4 is not"):
        store.fetch(4)


def test_publishing_again_replaces_and_ends_a_future_that_did_not_happen(open_store: Open) -> None:
    store = open_store(3)
    for version in range(5, 8):
        store.publish(version, buckets(version))
    store.publish(6, buckets(60))  # a run that was resumed from its checkpoint at 6
    assert store.newest() == 6
    assert_same(fetched(store, 6), buckets(60))
    assert_same(fetched(store, 5), buckets(5))
    with pytest.raises(PoolError, match="holds 5, 6"):
        store.fetch(7)


def test_an_adapter_with_nothing_to_send_is_a_version_too(open_store: Open) -> None:
    store = open_store(1)
    published = store.publish(0, [])
    assert (published.bytes, published.buckets, fetched(store, 0)) == (0, 0, [])
    with pytest.raises(PoolError, match="it holds 0"):
        store.fetch(1)


@pytest.mark.ray
def test_a_reader_that_writes_spoils_nothing_for_others(ray_session: None) -> None:
    from fmray.runtime.ray_weights import RayWeightStore

    store = RayWeightStore(1, 60.0)
    published = store.publish(0, buckets())
    fetched(store, 0)[0]["encoder.embed"].zero_()
    other = pickle.loads(pickle.dumps(store))  # as another process has it
    assert combined_checksum(map(bucket_checksum, fetched(other, 0))) == published.checksum


def test_an_iterator_that_fails_leaves_the_earlier_version(open_store: Open) -> None:
    store = open_store(2)
    store.publish(0, buckets())

    def breaks() -> Iterator[Bucket]:
        yield buckets(1)[0]
        raise OSError("the learner stumbled")

    with pytest.raises(OSError, match="stumbled"):
        store.publish(1, breaks())
    assert store.newest() == 0
    assert_same(fetched(store, 0), buckets())
    store.publish(1, buckets(1))
    assert_same(fetched(store, 1), buckets(1))
