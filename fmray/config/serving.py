"""What an endpoint can be told: its models, its batches, what a request may hold, who may ask, how it scales."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from fmray.config.base import RuntimeConfig, Section
from fmray.errors import ConfigError

HOST = re.compile(r"(\*\.)?[^\s/:@*?#\[\]\\%.]+(\.[^\s/:@*?#\[\]\\%.]+)*\.?(:[0-9]{1,5})?")


class BatchConfig(Section):
    """How requests that wait become batches."""

    max_items: Annotated[int, Field(ge=1)] | None = None
    """Items of one batch; None: 32 for a dual encoder, 32 conversations at once for a model that answers."""
    wait_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """How long an idle model waits for more items; 0: it starts with what is there, and the queue fills while it works."""
    queue_items: Annotated[int, Field(ge=1)] = 1024
    """Items that may wait; a request that does not fit is answered 429."""
    queue_mib: Annotated[float, Field(gt=0)] = 512.0
    """Their prepared tensors and encoded pictures, in MiB."""
    deadline_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A request that is older is answered 504, and what of it still waits is dropped before the model sees it."""
    prepare_threads: Annotated[int, Field(ge=1)] | None = None
    """Threads that decode and tokenise; None: one per core, at least 2."""


class FetchConfig(Section):
    """Pictures by http(s) address: none is fetched unless its host is listed."""

    hosts: tuple[str, ...] = ()
    """Hosts as they stand in the address (`images.example.org`), `*.example.org` for all below one; on ports 80 and 443,
    or as `images.example.org:8443` on that one alone. Their addresses must be public."""
    connect_seconds: Annotated[float, Field(gt=0)] = 3.0
    """Longest wait for a connection."""
    total_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Longest fetch, redirects included."""
    redirects: Annotated[int, Field(ge=0, le=10)] = 3
    """How many are followed; each address is checked as the first was."""
    at_once: Annotated[int, Field(ge=1)] = 16
    """Fetches that run at the same time; others wait their turn within their seconds."""
    per_request: Annotated[int, Field(ge=1)] = 16
    """Pictures that are fetched for one request; all of them together may be as large as a request's body."""

    @model_validator(mode="after")
    def _are_hosts(self) -> Self:
        for host in self.hosts:
            if not HOST.fullmatch(host):
                cure = "write a host as images.example.org, *.example.org or images.example.org:8443"
                raise ConfigError("fetch.hosts", host, cure)
        return self


class AccessConfig(Section):
    """Who may ask, and how much."""

    key_file: str | None = None
    """YAML file of hashed keys (`fmray keys add NAME --file FILE`), read again when it changes; None: anybody may ask."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Requests of one key (without keys: of one address), over all replicas, where the key's own entry says nothing else."""
    inputs_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Texts, pictures and conversations of one key, counted like requests."""
    address_header: Annotated[str, Field(pattern="^[a-z0-9-]+$")] | None = None
    """Header in which a proxy of ours writes who asks (`x-forwarded-for`: the last one of it counts); None: the connection's
    own address. Behind Ray Serve's proxy or a load balancer that is theirs: set this, or use keys, or all share one limit."""
    body_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A request whose body takes longer to arrive is answered 408."""
    log_requests: bool = False
    """One line per request: route, status, time, id and the key's name; no prompt, picture, key or path."""

    @property
    def limited(self) -> bool:
        """Whether anything may have to be counted: a key's own entry can say so too."""
        return self.key_file is not None or bool(self.requests_per_minute or self.inputs_per_minute)


class TraceConfig(Section):
    """OpenTelemetry traces: one span per request and where its time went; no prompt, picture, path or key."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^\s@]+$")] | None = None
    """Collector, OTLP over HTTP: `http://collector:4318/v1/traces`; None: no traces. Tokens for it go into
    OTEL_EXPORTER_OTLP_HEADERS, what else they should say of this process into OTEL_RESOURCE_ATTRIBUTES."""
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the requests that are traced; one that comes with a W3C `traceparent` is traced if that says so."""


class ScaleConfig(Section):
    """Replicas that follow the traffic (Ray Serve)."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    """0: nothing runs while nobody asks; the first request waits for a replica."""
    max_replicas: Annotated[int, Field(ge=1)] = 4
    """Most replicas."""
    load: Annotated[float, Field(gt=0, le=4)] = 0.8
    """Requests per replica that are aimed at, in batches: 0.8 of one keeps the next batch nearly full."""
    look_back_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Over how long the traffic is averaged."""
    upscale_seconds: Annotated[float, Field(ge=0)] = 10.0
    """How long there must be too few before one is added."""
    downscale_seconds: Annotated[float, Field(ge=0)] = 300.0
    """How long there must be too many before one ends."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ConfigError("scale.min_replicas", self.min_replicas, "must not exceed scale.max_replicas")
        return self


CHANGEABLE = ("checkpoint", "more", "batch")
"""Keys that Serve's `user_config` may have: they take effect in a running replica, without dropping a request."""


class ServeConfig(Section):
    """An endpoint for saved models."""

    checkpoint: str
    """A model folder, a checkpoint folder, or a run folder (its last good checkpoint)."""
    runtime: RuntimeConfig = RuntimeConfig()
    """`local`: uvicorn in this process; `ray`: a Ray Serve application."""
    model_id: str | None = None
    """Name under which clients ask for the model; None: by its kind fmray-clip, fmray-vqa or fmray-mllm."""
    more: dict[str, str] = Field(default={})
    """Further models of the same process: the names under which clients ask for them, and their folders."""
    library: str | None = None
    """A folder of models, each loaded when somebody first asks for its subfolder's name."""
    library_models: Annotated[int, Field(ge=1)] = 2
    """How many of them are in memory at the same time; the least recently used leaves."""
    indexes: dict[str, str] = Field(default={})
    """Indexes of pictures that `/v1/search` reads: their names and folders (`fmray index`)."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Copies of the model (Ray)."""
    scale: ScaleConfig | None = None
    """Replicas that follow the traffic (Ray); None: always `replicas`."""
    batch: BatchConfig = BatchConfig()
    """How requests become batches."""
    fetch: FetchConfig = FetchConfig()
    """Pictures by http(s) address."""
    access: AccessConfig = AccessConfig()
    """Keys and limits of those who ask."""
    trace: TraceConfig = TraceConfig()
    """Traces of requests."""
    page: bool = True
    """A web page at `/` to try the models with."""
    page_bases: tuple[Annotated[str, Field(pattern=r"^/([A-Za-z0-9._~-]+/?)*$")], ...] = ()
    """Further addresses of the same host at which the page looks for models: [/vqa] where this endpoint is at /clip."""
    max_inputs: Annotated[int, Field(ge=1)] = 2048
    """Texts and images in one request."""
    max_images: Annotated[int, Field(ge=1)] = 16
    """Images in one conversation (chat)."""
    max_body_mib: Annotated[int, Field(ge=1)] = 20
    """Size of a request's body."""
    max_image_mib: Annotated[int, Field(ge=1)] = 10
    """Size of one encoded image."""
    max_image_megapixels: Annotated[float, Field(gt=0)] = 40.0
    """Pixels of one image, by its header, before it is decoded."""
    max_labels: Annotated[int, Field(ge=1)] = 1000
    """Labels in one classification."""

    def named(self, kind: str) -> Self:
        """The same with a `model_id`: its own, or that of this kind of model."""
        return self if self.model_id is not None else self.replace(model_id=f"fmray-{kind}")

    @property
    def places(self) -> dict[str, str]:
        """Every model by the name under which clients ask for it; `named` comes first."""
        return {str(self.model_id): self.checkpoint, **self.more}

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """The same with what a running endpoint can change; raises ConfigError for another key."""
        for key, value in changes.items():
            if key not in CHANGEABLE:
                cure = f"an endpoint that runs can change {', '.join(CHANGEABLE)}; start another one for the rest"
                raise ConfigError(f"user_config.{key}", value, cure)
        return self.replace(**changes)
