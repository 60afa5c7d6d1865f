"""Traces as a switch: one OpenTelemetry span per request, below it what its time went into. Sent over OTLP/HTTP.

Spans are made when a request has ended, from times that were noted on its way: a request that nobody traces pays for a few
numbers in a list. Nothing of a prompt, a picture, a path or a key is in them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import fmray
from fmray.config.serving import TraceConfig
from fmray.errors import require_package
from fmray.serving.finished import Finished

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

PACKAGES = (
    "opentelemetry",
    "opentelemetry.sdk",
    *("opentelemetry.exporter", "opentelemetry.exporter.otlp", "opentelemetry.exporter.otlp.proto"),
    "opentelemetry.exporter.otlp.proto.http",
)
"""In the order in which one can be looked for: each inside the one before."""
EXPORT_SECONDS = 5.0
"""What sending a batch of spans may take, retries included; also how long an endpoint that ends waits for its last ones."""


class Tracer:
    """Makes a finished request's spans and sends them from a thread of its own; one that cannot be sent is dropped and logged.

    W3C `traceparent` is honoured: the spans belong to the caller's trace, and whether they are kept is as he has decided. Without
    one, `share` of the requests are kept. Further settings (headers with a token, resource attributes, a certificate) are
    OpenTelemetry's own environment variables.
    """

    def __init__(self, endpoint: str, share: float) -> None:
        """Raises MissingExtra where OpenTelemetry's exporter is not installed."""
        for package in PACKAGES:
            require_package(package, "trace", "trace.endpoint")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ours = Resource({"service.name": "fmray", "service.version": fmray.__version__})
        # a provider of its own, not the process' one: Ray Serve's tracing may have that
        self._provider: TracerProvider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(share),
            resource=ours.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fmray", fmray.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def finished(self, request: Finished) -> None:
        """One request's spans."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.status import Status, StatusCode

        # wall time only as an anchor: all distances are the monotonic clock's
        ended, clock = time.time_ns(), time.perf_counter()

        def at(moment: float) -> int:
            return ended - round((clock - moment) * 1e9)

        began = ended - round(request.seconds * 1e9)
        parent = self._propagator.extract({"traceparent": request.traceparent}, Context())
        span = self._tracer.start_span(
            f"{request.method} {request.route}",
            parent,
            SpanKind.SERVER,
            _attributes(request),
            start_time=began,
        )
        if span.is_recording():
            below = set_span_in_context(span, Context())
            for stage in request.stages:
                told = {"fmray.model": stage.model} if stage.model else {}
                child = self._tracer.start_span(
                    stage.name, below, attributes=told, start_time=max(began, at(stage.began))
                )
                child.end(min(ended, at(stage.ended)))
            if request.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
        span.end(ended)

    def close(self) -> None:
        """Send what is left; takes `EXPORT_SECONDS` where the collector does not answer."""
        self._provider.shutdown()


def open_tracer(config: TraceConfig) -> Tracer | None:
    """None where traces are off; raises MissingExtra."""
    return None if config.endpoint is None else Tracer(config.endpoint, config.share)


def _attributes(request: Finished) -> dict[str, Any]:
    """By OpenTelemetry's conventions where there is one."""
    told: dict[str, Any] = {
        "http.request.method": request.method,
        "http.route": request.route,
        "http.response.status_code": request.status,
        "fmray.request_id": request.request_id,
    }
    models = {stage.model for stage in request.stages if stage.model}
    if models:
        told["fmray.model"] = ",".join(sorted(models))
    if request.key_name != "-":
        told["fmray.key_name"] = request.key_name
    if request.status >= 500:
        told["error.type"] = str(request.status)
    return told
