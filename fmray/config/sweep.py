"""A sweep: many runs of one door, their keys drawn from a space, judged by one metric under constraints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fmray.config.base import ReportConfig, RunConfig, Section
from fmray.errors import ConfigError

# --------------------------------------------------------------------------------------------------------- the space


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as a string; people mean the number."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
Values = Annotated[tuple[Annotated[Any, BeforeValidator(_number)], ...], Field(min_length=1)]


class ChoiceDomain(Section):
    """One of these values, each as likely."""

    kind: Literal["choice"] = "choice"
    values: Values
    """What is drawn from."""


class GridDomain(Section):
    """Each of these values in turn: trials go through the product of all grids."""

    kind: Literal["grid"] = "grid"
    values: Values
    """What is gone through."""


class UniformDomain(Section):
    """A number between two others."""

    kind: Literal["uniform"] = "uniform"
    low: float
    """Smallest."""
    high: float
    """Largest."""


class LogUniformDomain(Section):
    """A positive number between two others, every factor as likely."""

    kind: Literal["loguniform"] = "loguniform"
    low: Annotated[float, Field(gt=0)]
    """Smallest."""
    high: Annotated[float, Field(gt=0)]
    """Largest."""


class RandIntDomain(Section):
    """A whole number between two others, both included."""

    kind: Literal["randint"] = "randint"
    low: int
    """Smallest."""
    high: int
    """Largest."""


Domain = Annotated[
    ChoiceDomain | GridDomain | UniformDomain | LogUniformDomain | RandIntDomain,
    Field(discriminator="kind"),
]
DOMAIN_KEYS = {"kind", "values", "low", "high"}

# ----------------------------------------------------------------------------------------------------- the schedulers


class NoScheduler(Section):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class AshaScheduler(Section):
    """Successive halving: at grace, grace·reduction, grace·reduction², … steps the best 1/reduction go on.

    On Ray asynchronously (ASHA, Li et al. 2018, arXiv:1810.05934), in local mode rung by rung (Jamieson & Talwalkar 2016).
    """

    kind: Literal["asha"] = "asha"
    grace: Annotated[int, Field(ge=1)]
    """Steps (iterations in RLHF) before the first decision."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """One of so many goes on, with so many times the steps."""


class PbtScheduler(Section):
    """Population-based training (Jaderberg et al. 2017, arXiv:1711.09846): the worst continue from the best's checkpoint."""

    kind: Literal["pbt"] = "pbt"
    interval: Annotated[int, Field(ge=1)]
    """Steps (iterations in RLHF) between two comparisons."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the population that is replaced, by as many of the best."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability that a key is drawn anew instead of being moved from the donor's value."""
    factors: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.8, 1.2)
    """A number moves by one of these factors, inside its domain; a choice to a neighbour."""


SCHEDULER_KINDS = ("none", "asha", "pbt")
Scheduler = Annotated[NoScheduler | AshaScheduler | PbtScheduler, Field(discriminator="kind")]

# ------------------------------------------------------------------------------------------------- what is good enough


class Constraint(Section):
    """A bound on a metric; a trial that ends beyond it is infeasible and never the best."""

    metric: str
    """As in metrics.jsonl, such as `eval/kl`."""
    max: float | None = None
    """Largest allowed value."""
    min: float | None = None
    """Smallest allowed value."""

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.max is None and self.min is None:
            raise ConfigError("constraints", self.metric, "give max, min or both")
        return self


class Objective(Section):
    """One axis of the Pareto plot."""

    metric: str
    """As in metrics.jsonl."""
    mode: Literal["max", "min"] = "max"
    """Which end is good."""


class ParetoConfig(Section):
    """The trade-off that the report draws: two objectives, and a third number as colour."""

    x: Objective
    """From left to right."""
    y: Objective
    """From bottom to top."""
    color: str | None = None
    """Metric shown as the points' colour, such as `eval/kl`."""


class SweepRuntimeConfig(Section):
    """Where the trials run. Each trial's own `runtime` section is the swept configuration's."""

    kind: Literal["local", "ray"] = "local"
    """`local`: one trial after the other in this process. `ray`: Ray Tune, several at once."""
    address: str | None = None
    """A running Ray cluster (`auto`, `ray://host:10001`); None starts one on this machine."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Trials at once; None: as many as the cluster's CPUs and GPUs hold, learners and pools of a trial counted."""
    cpus_per_trial: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for a trial's own process; its learners and pools on Ray come on top."""
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for a trial's own process."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often a trial whose process died is taken up again, from its checkpoint."""


MAY_CHANGE = ("run", "runtime", "report", "trials", "metric", "mode", "constraints", "pareto")
"""What the same sweep may have otherwise when it is run again."""


class SweepConfig(Section):
    """A sweep over any keys of a door's configuration; the same name and storage again means: go on with it."""

    run: RunConfig = RunConfig(name="sweep")
    """Name, storage, seed of the sweep; trials are runs in this folder."""
    runtime: SweepRuntimeConfig = SweepRuntimeConfig()
    """One after the other, or on Ray."""
    report: ReportConfig = ReportConfig()
    """Where each trial's metrics go; `progress` prints a line for every trial that ends."""
    root: Literal["rlhf", "pretrain"] = "rlhf"
    """The door that is swept."""
    recipe: str | None = None
    """That door's recipe to start from."""
    file: str | None = None
    """A configuration file of that door (YAML, TOML, JSON), over the recipe."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Keys of all trials, nested or dotted, over recipe and file: `base.train.iterations=8`."""
    space: Annotated[dict[str, Domain], Field(min_length=1)]
    """Dotted key → domain: `space.ppo.kl.coefficient='{kind: loguniform, low: 0.01, high: 0.3}'`."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """How many; None: one for each point of the grid."""
    metric: str
    """What is compared, as in metrics.jsonl: `eval/score`. A trial's last value counts."""
    mode: Literal["max", "min"] = "max"
    """Which end is good."""
    constraints: tuple[Constraint, ...] = ()
    """Bounds that a trial must keep to be the best."""
    scheduler: Scheduler = NoScheduler()
    """Who goes on: all, the better ones (asha), or a population that learns from its best (pbt)."""
    pareto: ParetoConfig | None = None
    """The trade-off to draw in the report."""

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, space: Any) -> Any:
        return flatten_space(space) if isinstance(space, Mapping) else space

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, domain in self.space.items():
            if not isinstance(domain, ChoiceDomain | GridDomain) and not domain.low < domain.high:
                raise ConfigError(f"space.{key}.low", domain.low, f"must be below high={domain.high}")
        points = self.grid_points
        if self.trials is None and not any(domain.kind == "grid" for domain in self.space.values()):
            raise ConfigError("trials", None, "say how many; only a space with a grid knows its own number")
        if self.trials is not None and self.trials % points:
            raise ConfigError("trials", self.trials, f"must be a multiple of the grid's {points} points")
        if self.scheduler.kind == "pbt" and self.trial_count < 2:
            raise ConfigError("trials", self.trial_count, "a population needs at least 2")
        if self.report.prometheus_port is not None:
            cure = "trials would share the port; leave it out, on Ray they go through Ray's exporter"
            raise ConfigError("report.prometheus_port", self.report.prometheus_port, cure)
        return self

    @property
    def grid_points(self) -> int:
        """Points of the product of all grids; 1 where there is none."""
        return math.prod(len(domain.values) for domain in self.space.values() if domain.kind == "grid")

    @property
    def trial_count(self) -> int:
        """How many trials there are."""
        return self.trials or self.grid_points


def is_domain(value: Any) -> bool:
    """Whether this is a domain rather than a section above one (`objective.kind` may be swept: then `kind` is a section)."""
    if not isinstance(value, Mapping):
        return True
    return any(not isinstance(inner, Mapping) for key, inner in value.items() if key in DOMAIN_KEYS)


def flatten_space(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optimizer": {"lr": {"kind": …}}}` as `{"optimizer.lr": {"kind": …}}`; what comes later is laid over what came before.

    A domain given anew with another kind replaces the earlier one: their keys differ.
    """
    flat: dict[str, Any] = {}
    for name, value in space.items():
        key = f"{prefix}{name}"
        found_here = {key: value} if is_domain(value) else flatten_space(value, f"{key}.")
        for found, domain in found_here.items():
            if isinstance(domain, Section):
                domain = domain.model_dump()
            before = flat.get(found)
            if isinstance(before, Mapping) and isinstance(domain, Mapping):
                same_kind = before.get("kind") == domain.get("kind", before.get("kind"))
                domain = {**before, **domain} if same_kind else domain
            flat[found] = domain
    return flat
