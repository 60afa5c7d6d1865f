"""Rate limits: never more than the limit in any minute, in one process and over replicas that lease."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.errors import RequestError
from fmray.runtime import windows
from fmray.runtime.windows import SLOT, Windows
from fmray.serving.keys import Holder
from fmray.serving.rate_limits import RateLimits, duration


def most_in_a_minute(admitted: Sequence[tuple[float, int]]) -> int:
    """The largest sum over any 60 seconds, by brute force: a fullest one begins at an admission."""
    return max((sum(n for at, n in admitted if start <= at < start + 60) for start, _ in admitted), default=0)


@settings(deadline=None, max_examples=60)
@given(
    limit=st.integers(1, 40),
    asked=st.lists(st.tuples(st.floats(0, 9), st.integers(1, 12)), min_size=1, max_size=120),
    lease=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_never_more_than_the_limit_in_any_minute(
    limit: int, asked: list[tuple[float, int]], lease: float
) -> None:
    """Spent as late as a lease allows, or at once: both must hold."""
    counted, now, early, late = Windows(lease=lease), 1e6, [], []
    for step, (pause, need) in enumerate(asked):
        now += pause
        granted = counted.take("k", limit, need, need, now).granted
        early.append((now, granted))
        late.append((now + (lease if step % 2 else 0.0), granted))
    assert most_in_a_minute(early) <= limit
    assert most_in_a_minute(late) <= limit


def test_what_is_said_about_the_future_is_true() -> None:
    counted = Windows()
    for i in range(10):
        grant = counted.take("k", 10, 1, 1, 100.0 + i)
        assert (grant.granted, grant.left, grant.wait) == (1, 9 - i, 0.0)
    refused = counted.take("k", 10, 3, 3, 110.0)
    assert (refused.granted, refused.left) == (0, 0)
    assert 60 <= refused.wait + 110.0 - 102.0 <= 60 + 2 * SLOT
    assert counted.take("k", 10, 3, 3, 110.0 + refused.wait - 0.01).granted == 0
    assert counted.take("k", 10, 3, 3, 110.0 + refused.wait).granted == 3
    assert counted.take("k", 10, 1, 1, 110.0 + refused.reset + 60).left == 9
    assert math.isinf(counted.take("k", 10, 11, 11, 1e4).wait)


def test_a_patient_asker_gets_nearly_all_of_it() -> None:
    """One request whenever one is due: 60 / 60.5 of the limit at least, over ten minutes."""
    counted, now, admitted = Windows(), 0.0, 0
    while now < 600:
        grant = counted.take("k", 120, 1, 1, now)
        admitted += grant.granted
        now += grant.wait or 0.05
    assert 120 * 10 * 0.985 <= admitted <= 120 * 10


def test_more_than_is_needed_is_given_sparingly() -> None:
    counted = Windows()
    assert counted.take("k", 100, 1, 90, 0.0).granted == 25  # a quarter of what was left
    assert counted.take("k", 100, 1, 90, 0.0).granted == 18
    assert counted.take("k", 100, 50, 90, 0.0).granted == 50
    assert counted.take("k", 100, 8, 90, 0.0).granted == 0
    assert counted.take("k", 100, 7, 90, 0.0).granted == 7


def test_what_is_given_back_can_be_had_again() -> None:
    counted = Windows()
    first = counted.take("k", 10, 8, 8, 0.0)
    assert counted.take("k", 10, 5, 5, 1.0).granted == 0
    assert counted.take("k", 10, 5, 5, 1.0, [(first.slot, 3)]).granted == 5
    assert counted.take("k", 10, 1, 1, 1.0, [(first.slot, 99), (first.slot + 1, 99), (-5, 1)]).granted == 1
    assert counted.take("k", 10, 0, 0, 1.0).left == 4  # of the first only what it was: 5 + 1 are out


def test_names_are_apart_and_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MOST_NAMES", 50)
    counted = Windows()
    for i in range(500):
        assert counted.take(f"address:{i}", 1, 1, 1, 0.0).granted == 1
    assert len(counted) <= 51
    assert counted.take("address:499", 1, 1, 1, 0.0).granted == 0
    for _ in range(60):
        counted.take("late", 10**6, 1, 1, 1000.0)
    assert len(counted) == 1


# --------------------------------------------------------------------------------------------------- callers


def test_a_callers_limits_are_its_own_or_the_configured_ones() -> None:
    limits = RateLimits(requests=10, inputs=20)
    assert limits.caller(None, "10.0.0.1").limits == {"requests": 10, "inputs": 20}
    assert limits.caller(Holder("a", 5, None), "10.0.0.1").limits == {"requests": 5, "inputs": 20}
    assert RateLimits().caller(Holder("a", None, 7), "").limits == {"requests": None, "inputs": 7}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("testclient", "other", False),
        ("10.0.0.1", "key:a", False),
    ],
)
def test_who_is_who_without_keys(one: str, other: str, same: bool) -> None:
    limits = RateLimits(requests=1)
    assert (limits.caller(None, one).name == limits.caller(None, other).name) is same


def test_a_key_cannot_be_named_like_an_address() -> None:
    limits = RateLimits(requests=1)
    assert limits.caller(Holder("10.0.0.1", None, None), "").name != limits.caller(None, "10.0.0.1").name


def test_the_refusal_says_when_to_come_back() -> None:
    async def scenario() -> None:
        caller = RateLimits(requests=2, inputs=5).caller(Holder("a", None, None), "")
        await caller.charge("requests", 1)
        await caller.charge("requests", 1)
        assert caller.headers["x-ratelimit-limit-requests"] == "2"
        assert caller.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(
            RequestError, match=r"^this key may send 2 requests a minute; ask again in 6[01] s$"
        ) as no:
            await caller.charge("requests", 1)
        assert (no.value.status, no.value.code) == (429, "rate_limit_exceeded")
        assert no.value.retry_after is not None
        assert 59 < no.value.retry_after <= 60.5
        await caller.charge("inputs", 5)
        with pytest.raises(RequestError) as too_many:
            await caller.charge("inputs", 6)
        assert (too_many.value.status, too_many.value.code) == (400, "too_many_inputs")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.25, "250ms"), (6, "6s"), (59.75, "59.75s"), (60.25, "1m0.25s")]
)
def test_durations_are_openais(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------------------------------------- over replicas


class Clock:
    """Time for the simulation below."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("replicas", [1, 4, 16])
def test_leases_hold_the_limit_over_replicas(replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ledger of each replica and the real windows, in simulated time; only the wire between them is left out."""
    pytest.importorskip("ray")
    from fmray.runtime import ray_limits
    from fmray.runtime.ray_limits import LEASE, RayLedger

    clock, counted, questions = Clock(), Windows(lease=2 * LEASE), 0
    monkeypatch.setattr(ray_limits, "time", clock)

    class Wire:
        """`actor.take.remote(…)` that takes a while, within which time goes on."""

        @property
        def take(self) -> Wire:
            return self

        async def remote(self, *given: object) -> object:
            nonlocal questions
            questions += 1
            clock.now += 0.001
            name, limit, need, want, back = given
            return counted.take(name, limit, need, want, clock.now, back)  # type: ignore[arg-type]

    async def scenario() -> list[tuple[float, int]]:
        chance = random.Random(replicas)
        ledgers = [RayLedger("app") for _ in range(replicas)]
        for ledger in ledgers:
            ledger._actor = Wire()
        admitted = []
        while clock.now < 1000 + 200:
            clock.now += chance.expovariate(40)  # 40 a second are asked, of which 10 may pass
            need = chance.choice([1, 1, 1, 5])
            grant = await chance.choice(ledgers).take("k", 600, need)
            admitted.append((clock.now, grant.granted))
        return admitted

    admitted = asyncio.run(scenario())
    asked = len(admitted)
    passed = [(at, n) for at, n in admitted if n]
    assert most_in_a_minute(passed) <= 600
    assert sum(n for at, n in passed) >= 0.95 * 600 * 200 / 62  # and nearly all of it is given
    assert questions < asked
