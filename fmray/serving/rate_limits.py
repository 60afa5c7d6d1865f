"""How much one key, or one address, may ask in a minute: requests at the border, inputs once they are counted."""

from __future__ import annotations

import ipaddress
import math
import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from starlette.requests import Request

from fmray.errors import RequestError
from fmray.runtime.windows import Grant, Windows
from fmray.serving.keys import Holder

What = Literal["requests", "inputs"]


class Ledger(Protocol):
    """Who counts: this process (`LocalLedger`), or an actor for all replicas (`fmray.runtime.ray_limits.RayLedger`)."""

    async def start(self) -> None:
        """Before the first request, so that it does not wait for what counts."""
        ...

    async def take(self, name: str, limit: int, need: int) -> Grant:
        """`need` admissions of `name`, all or none, of `limit` in any 60 seconds."""
        ...


class LocalLedger:
    """One process counts for itself."""

    def __init__(self) -> None:
        self._windows = Windows()

    async def start(self) -> None:
        """Nothing to wait for."""

    async def take(self, name: str, limit: int, need: int) -> Grant:
        return self._windows.take(name, limit, need, need, time.monotonic())


@dataclass(slots=True)
class Caller:
    """One request's asker, with what it may; the border puts it into `scope["state"]["caller"]`."""

    name: str
    """Of the key, or the address."""
    ledger: Ledger
    limits: dict[What, int | None]
    headers: dict[str, str] = field(default_factory=dict)
    """What the reply's headers will say, as OpenAI's do."""

    async def charge(self, what: What, count: int) -> None:
        """Raises RequestError: 429 with the seconds after which the same would be let in, 400 for more at once than a whole
        minute has. What is refused is not counted."""
        limit = self.limits[what]
        if limit is None or count == 0:
            return
        grant = await self.ledger.take(f"{what}:{self.name}", limit, count)
        self.headers[f"x-ratelimit-limit-{what}"] = str(limit)
        self.headers[f"x-ratelimit-remaining-{what}"] = str(grant.left)
        self.headers[f"x-ratelimit-reset-{what}"] = duration(grant.reset)
        if grant.granted:
            return
        who = "this key" if self.name.startswith("key:") else "this address"
        if math.isinf(grant.wait):
            message = (
                f"{count} inputs in one request, but {who} may send {limit} a minute: send fewer at once"
            )
            raise RequestError(400, "too_many_inputs", message, "input")
        message = f"{who} may send {limit} {what} a minute; ask again in {math.ceil(grant.wait)} s"
        raise RequestError(429, "rate_limit_exceeded", message, retry_after=grant.wait)


class RateLimits:
    """Every key's limits: its own, or else the configured ones."""

    def __init__(
        self, ledger: Ledger | None = None, *, requests: int | None = None, inputs: int | None = None
    ) -> None:
        self.ledger = ledger or LocalLedger()
        self._requests, self._inputs = requests, inputs

    def caller(self, holder: Holder | None, address: str) -> Caller:
        """Who asks. Without keys it is the address: of IPv6 the first 64 bits, which is what one household is given."""
        if holder is None:
            name, own = f"address:{_network(address)}", Holder("", None, None)
        else:
            name, own = f"key:{holder.name}", holder
        limits: dict[What, int | None] = {
            "requests": own.requests_per_minute or self._requests,
            "inputs": own.inputs_per_minute or self._inputs,
        }
        return Caller(name, self.ledger, limits)


async def charge(request: Request, inputs: int) -> None:
    """For routes, once they know: `await charge(request, len(asks))`. Raises as `Caller.charge`; free without limits."""
    caller: Caller | None = request.scope.get("state", {}).get("caller")
    if caller is not None:
        await caller.charge("inputs", inputs)


def duration(seconds: float) -> str:
    """As OpenAI writes it: `250ms`, `6s`, `1m0.25s`."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed), 64), strict=False))
    return str(parsed)
