"""Recipes of sweeps."""

from __future__ import annotations

from collections.abc import Callable

from fmray.config.base import RunConfig
from fmray.config.sweep import ChoiceDomain, LogUniformDomain, Objective, ParetoConfig, SweepConfig


def sweep_clip_tiny() -> SweepConfig:
    """Learning rate and loss of clip_tiny, four trials: a minute, for trying a sweep."""
    return SweepConfig(
        run=RunConfig(name="sweep_clip_tiny"),
        root="pretrain",
        recipe="clip_tiny",
        space={
            "optimizer.lr": LogUniformDomain(low=1e-4, high=1e-2),
            "objective.kind": ChoiceDomain(values=("infonce", "siglip")),
        },
        trials=4,
        metric="eval/image_to_text/r5",
        pareto=ParetoConfig(
            x=Objective(metric="eval/image_to_text/r5"),
            y=Objective(metric="eval/text_to_image/r5"),
            color="train/loss",
        ),
    )


SWEEP_RECIPES: dict[str, Callable[[], SweepConfig]] = {"sweep_clip_tiny": sweep_clip_tiny}
