"""Where trials' keys come from: pure functions of (sweep seed, trial number), so that every place draws the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from random import Random
from typing import Any

from fmray.config.loading import merge
from fmray.config.sweep import ChoiceDomain, Domain, GridDomain, LogUniformDomain, PbtScheduler, RandIntDomain

Space = Mapping[str, Domain]


def sample(space: Space, seed: int, trial: int) -> dict[str, Any]:
    """The keys of trial number `trial` (from 0). A key's value does not depend on which other keys there are.

    Grids are gone through in the order of the space, the last one fastest; trials beyond their product start over, with
    other draws of the other keys.
    """
    drawn: dict[str, Any] = {}
    grids = {key: domain for key, domain in space.items() if isinstance(domain, GridDomain)}
    left = trial
    for key, grid in reversed(grids.items()):
        left, index = divmod(left, len(grid.values))
        drawn[key] = grid.values[index]
    for key, domain in space.items():
        if key not in drawn:
            drawn[key] = draw(domain, Random(f"{seed}/{trial}/{key}"))
    return {key: drawn[key] for key in space}


def draw(domain: Domain, random: Random) -> Any:
    """One value of a domain."""
    if isinstance(domain, ChoiceDomain | GridDomain):
        return random.choice(domain.values)
    if isinstance(domain, RandIntDomain):
        return random.randint(domain.low, domain.high)
    if isinstance(domain, LogUniformDomain):
        return clip(math.exp(random.uniform(math.log(domain.low), math.log(domain.high))), domain)
    return random.uniform(domain.low, domain.high)


def mutate(space: Space, keys: Mapping[str, Any], rule: PbtScheduler, random: Random) -> dict[str, Any]:
    """PBT's explore: each key drawn anew with probability `rule.resample`, else moved a little from the donor's value.

    A number is multiplied by one of `rule.factors` and kept inside its domain (a whole number moves by 1 at least where
    the domain allows); a choice goes to a neighbour in the order of its values.
    """
    return {key: _moved(domain, keys[key], rule, random) for key, domain in space.items()}


def _moved(domain: Domain, value: Any, rule: PbtScheduler, random: Random) -> Any:
    if random.random() < rule.resample:
        return draw(domain, random)
    if isinstance(domain, ChoiceDomain | GridDomain):
        at = [json.dumps(choice) for choice in domain.values].index(json.dumps(value)) + random.choice(
            (-1, 1)
        )
        return domain.values[min(max(at, 0), len(domain.values) - 1)]
    factor = random.choice(rule.factors)
    if isinstance(domain, RandIntDomain):
        moved = round(value * factor)
        return clip(moved if moved != value else value + (1 if factor > 1 else -1), domain)
    return clip(value * factor, domain)


def clip(value: Any, domain: Any) -> Any:
    """The nearest value between `domain.low` and `domain.high`."""
    return min(max(value, domain.low), domain.high)


def nest(keys: Mapping[str, Any]) -> dict[str, Any]:
    """`{"optimizer.lr": 0.1, "train": {"steps": 3}}` as nested keys; dotted and nested ones may be mixed."""
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        inner: Any = nest(value) if isinstance(value, Mapping) else value
        for part in reversed(key.split(".")):
            inner = {part: inner}
        nested = merge(nested, inner)
    return nested
