"""The sweep as a plain loop, one trial after the other in this process; rerun, it replays what is on disk and goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from random import Random

from fmray.config.sweep import AshaScheduler, PbtScheduler
from fmray.runtime.context import stop_on_sigterm
from fmray.runtime.oversight import stop_file
from fmray.tuning.readings import score
from fmray.tuning.space import mutate
from fmray.tuning.trials import Change, Trials

Ask = Callable[[], bool]
Tell = Callable[[], object]


def run_in_turn(trials: Trials, changed: Tell) -> None:
    """All trials under the sweep's scheduler; a signal or a `stop` file ends it, the running trial saved.

    `changed()` is called whenever a trial has got on.
    """
    rule, asked = trials.sweep.scheduler, stop_file(trials.folder)
    with stop_on_sigterm() as signalled:

        def stop() -> bool:
            return signalled() or asked()

        if rule.kind == "asha":
            halve(trials, rule, stop, changed)
        elif rule.kind == "pbt":
            breed(trials, rule, stop, changed)
        else:
            advance_all(trials, trials.numbers, None, stop, changed)


def advance_all(
    trials: Trials, numbers: Iterable[int], milestone: int | None, stop: Ask, changed: Tell
) -> dict[int, float]:
    """The scores at a milestone of the trials that got there."""
    scores = {}
    for number in numbers:
        if stop():
            break
        reading = trials.advance(number, milestone, stop)
        changed()
        if reading is not None:
            scores[number] = score(reading, trials.sweep)
    return scores


def best_first(scores: dict[int, float]) -> list[int]:
    """Trials by score; of equal ones the earlier."""
    return sorted(scores, key=lambda number: (-scores[number], number))


def halve(trials: Trials, rule: AshaScheduler, stop: Ask, changed: Tell) -> None:
    """Successive halving (Jamieson & Talwalkar 2016): at each rung the best ⌊n/reduction⌋ of n go on, one at least."""
    alive = list(trials.numbers)
    for rung in trials.milestones():
        scores = advance_all(trials, alive, rung, stop, changed)
        if stop():
            return
        ranked = best_first(scores)
        survivors = ranked[: max(1, len(ranked) // rule.reduction)]
        for number in set(ranked) - set(survivors):
            trials.give_up(number)
        alive = sorted(survivors)
        changed()
    advance_all(trials, alive, None, stop, changed)


def breed(trials: Trials, rule: PbtScheduler, stop: Ask, changed: Tell) -> None:
    """Synchronous PBT (Jaderberg et al. 2017): at each interval the worst go on from a checkpoint of the best, keys mutated."""
    for milestone in trials.milestones():
        scores = advance_all(trials, trials.numbers, milestone, stop, changed)
        if stop():
            return
        ranked = best_first(scores)
        many = min(math.ceil(len(ranked) * rule.quantile), len(ranked) // 2)
        for number in ranked[len(ranked) - many :]:
            taken = [change.step for change in trials.record(number).changes]
            if milestone in taken:
                continue  # a rerun: that decision was carried out
            random = Random(f"{trials.sweep.run.seed}/pbt/{milestone}/{number}")
            donor = random.choice(ranked[:many])
            keys = mutate(trials.sweep.space, trials.record(donor).keys, rule, random)
            trials.adopt(number, Change(milestone, trials.name(donor), keys))
        changed()
    advance_all(trials, trials.numbers, None, stop, changed)
