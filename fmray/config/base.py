"""What every run can be told: its name, where it runs, where its metrics go."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fmray.errors import ConfigError


class Section(BaseModel):
    """A frozen group of keys. `section.replace(steps=10)` returns a checked copy."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )

    def replace(self, **changes: Any) -> Self:
        """A copy with some keys changed, validated again."""
        return type(self).model_validate({**dict(self), **changes})


class RunConfig(Section):
    """The run's name and home. The same name and storage again means: resume."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "pretrain"
    """Folder of the run under `storage`; letters, digits, '.', '_' and '-'."""
    storage: str = "runs"
    """A folder or any fsspec URL (`s3://bucket/runs`); on several hosts it must be reachable from all of them."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Everything random is a function of this number and of a position."""
    fresh: bool = False
    """Start over: delete what the run folder holds, instead of resuming from it."""


class RuntimeConfig(Section):
    """Where the same code runs: in this process, or on Ray Train's workers."""

    kind: Literal["local", "ray"] = "local"
    """`local`: this process, rank 0 of 1, no Ray. `ray`: a Ray Train worker group."""
    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Data-parallel learners; `[min, max]` is elastic: a lost or gained worker restarts the group from its checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when torch sees one, whatever Ray was told."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Torch threads per worker; None: this host's cores divided by the workers."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for each worker."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for each worker; fractions share one."""
    address: str | None = None
    """A running Ray cluster (`auto`, `ray://host:10001`); None starts one on this machine."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """How often Ray Train restarts the group after a worker died; -1: without end."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ConfigError("runtime.workers", list(self.workers), "write [min, max] with min <= max")
        if self.kind == "local" and self.workers != 1:
            raise ConfigError(
                "runtime.workers", self.workers, "local mode is one process; set runtime.kind=ray"
            )
        if self.device == "cpu" and self.gpus_per_worker > 0:
            raise ConfigError(
                "runtime.gpus_per_worker", self.gpus_per_worker, "must be 0 with runtime.device=cpu"
            )
        return self

    @property
    def worker_counts(self) -> range:
        """Every number of learners this run may have."""
        low, high = self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)
        return range(low, high + 1)


class ReportConfig(Section):
    """Where metrics go. `metrics.jsonl` in the run folder is always written."""

    tensorboard: bool = False
    """TensorBoard event files under `<run>/tensorboard`."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases; `offline` writes under `<run>/wandb` without a network."""
    mlflow: str | None = None
    """MLflow tracking URI (`http://host:5000`, `sqlite:///mlflow.db`)."""
    prometheus_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Local mode serves Prometheus metrics here; in Ray they go through Ray's own exporter, always."""
    progress: bool = True
    """A progress bar on the terminal."""
