"""What an endpoint counts: one fixed table of names and buckets, on `/metrics` and in Ray's exporter alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a time of birth beside every series, which nobody reads

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ITEMS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """`Metric("counter", "Requests that were answered.", ("route", "code"))`"""

    kind: Literal["counter", "gauge", "histogram"]
    doc: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()
    """Constants, the same in every process of a host: Ray's exporter drops a histogram whose bounds differ."""


METRICS: dict[str, Metric] = {
    "fmray_requests_total": Metric("counter", "Requests that were answered.", ("route", "code")),
    "fmray_request_seconds": Metric(
        "histogram", "From a request's first byte to its last.", ("route",), SECONDS
    ),
    "fmray_prepare_seconds": Metric("histogram", "Decoding or tokenising one item.", ("model",), SECONDS),
    "fmray_queue_seconds": Metric(
        "histogram", "From prepared to the model's first look at it.", ("model",), SECONDS
    ),
    "fmray_infer_seconds": Metric(
        "histogram", "One forward pass, or one token of all running answers.", ("model",), SECONDS
    ),
    "fmray_first_token_seconds": Metric(
        "histogram", "From a question's arrival to its answer's first token.", ("model",), SECONDS
    ),
    "fmray_batch_items": Metric("histogram", "Items of one forward pass.", ("model",), ITEMS),
    "fmray_items_total": Metric(
        "counter", "Texts, pictures and conversations that were answered.", ("model",)
    ),
    "fmray_tokens_total": Metric("counter", "Tokens that were read and said.", ("model", "direction")),
    "fmray_held_items": Metric("gauge", "Items that wait or are being prepared.", ("model",)),
    "fmray_held_bytes": Metric("gauge", "Their bytes.", ("model",)),
    "fmray_rejected_total": Metric("counter", "Items that were not answered, and why.", ("model", "reason")),
    "fmray_cache_hits_total": Metric("counter", "Labels whose vectors were known.", ("model",)),
    "fmray_cache_misses_total": Metric("counter", "Labels whose vectors were made.", ("model",)),
    "fmray_fetches_total": Metric("counter", "Pictures fetched by address, by outcome.", ("outcome",)),
    "fmray_ready": Metric("gauge", "1 where the last synthetic item went through the model.", ("model",)),
}
"""Names that dashboards and alerts rest on. Ray's exporter puts `ray_` before them."""

Sink = Callable[[str, float, dict[str, str]], None]
"""Takes name, value and labels a second time (Ray's exporter)."""


class Meters:
    """Counts into a registry of its own, and into Ray's exporter where there is one.

    Every method raises KeyError for a name that the table lacks.
    """

    def __init__(self, also: Sink | None = None) -> None:
        self._registry = CollectorRegistry()
        self._also = also
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, metric in METRICS.items():
            if metric.kind == "counter":
                self._counters[name] = Counter(name, metric.doc, metric.labels, registry=self._registry)
            elif metric.kind == "gauge":
                self._gauges[name] = Gauge(name, metric.doc, metric.labels, registry=self._registry)
            else:
                self._histograms[name] = Histogram(
                    name, metric.doc, metric.labels, buckets=metric.buckets, registry=self._registry
                )

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._counters[name].labels(**labels).inc(amount)
        self._tell(name, amount, labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._gauges[name].labels(**labels).set(value)
        self._tell(name, value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        self._histograms[name].labels(**labels).observe(value)
        self._tell(name, value, labels)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _tell(self, name: str, value: float, labels: dict[str, str]) -> None:
        if self._also is not None:
            self._also(name, value, labels)
