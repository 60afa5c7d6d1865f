"""What a loop does when, as functions of the step alone: a resume needs no clock and no random state."""

from __future__ import annotations


def noise_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step's dropout on a rank: counted, not remembered, so a resume needs no random state.

    A thousand seeds apart leave room for GradCache's chunks, which take the ones that follow.
    """
    return (((seed * 1_000_003 + step) * 1_009 + rank) * 1_000) % (1 << 62)


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0
