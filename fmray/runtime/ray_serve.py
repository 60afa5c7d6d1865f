"""An ASGI app on Ray Serve: one application, N replicas, each building the app for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import ray
from ray import serve
from ray.serve import metrics
from ray.serve.config import ProxyLocation
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fmray.errors import ResourceError
from fmray.runtime.ports import bind
from fmray.runtime.ray_cluster import require_resources


class Replica(Protocol):
    """What stands behind one replica."""

    @property
    def app(self) -> ASGIApp: ...

    async def reconfigure(self, changes: Mapping[str, Any]) -> None:
        """Told the deployment's `user_config`: once after the start where there is one, and whenever it changes."""
        ...

    async def check(self) -> None:
        """Raises where the replica must be replaced."""
        ...


DEPLOYMENT = "Model"
"""The one deployment of every application."""


def application(open_replica: Callable[[], Replica], options: Mapping[str, Any]) -> serve.Application:
    """An application of one deployment: no hop between the proxy and the model.

    open_replica: called once in each replica; it must pickle by reference. options: `serve.deployment`'s own.
    """

    class Model:
        def __init__(self) -> None:
            self._replica = open_replica()

        def __serve_build_asgi_app__(self) -> ASGIApp:
            return _without_request_id(self._replica.app)

        async def reconfigure(self, user_config: dict[str, Any]) -> None:
            await self._replica.reconfigure(user_config)

        async def check_health(self) -> None:
            await self._replica.check()

    deployment = serve.deployment(serve.ingress()(Model))
    return deployment.options(name=DEPLOYMENT, logging_config=_quiet(), **options).bind()


def run_app(
    application: serve.Application, *, name: str, host: str, port: int, wanted: Mapping[str, float]
) -> None:
    """Deploy an application at `/`, and return once it answers; inside `connected`.

    wanted: CPUs and GPUs that it needs at once. Raises ResourceError: the port is taken, the cluster is too small, or the
    replicas do not come up.
    """
    require_resources(dict(wanted), f"the replicas of {name}", "lower replicas or scale.min_replicas")
    if serve.status().proxies:
        _check_listens(host, port)
    else:
        bind(host, port).close()
        options = {"host": host, "port": port}
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=_quiet())
    try:
        serve.run(application, name=name, route_prefix="/")
    except RuntimeError:
        reason = _last_error(name)
        stop_app(name)
        raise ResourceError(f"Ray Serve could not start {name}: {reason}") from None


class MetricFacts(Protocol):
    """A row of a table of metrics."""

    @property
    def kind(self) -> Literal["counter", "gauge", "histogram"]: ...

    @property
    def doc(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def buckets(self) -> tuple[float, ...]: ...


def metrics_sink(table: Mapping[str, MetricFacts]) -> Callable[[str, float, dict[str, str]], None]:
    """Counts into Ray's exporter, which puts `ray_` before each name and adds deployment and replica. In a replica."""
    counters = {
        name: metrics.Counter(name, row.doc, row.labels)
        for name, row in table.items()
        if row.kind == "counter"
    }
    gauges = {
        name: metrics.Gauge(name, row.doc, row.labels) for name, row in table.items() if row.kind == "gauge"
    }
    histograms = {
        name: metrics.Histogram(name, row.doc, list(row.buckets), row.labels)
        for name, row in table.items()
        if row.kind == "histogram"
    }

    def tell(name: str, value: float, labels: dict[str, str]) -> None:
        if name in counters:
            if value > 0:  # Ray refuses to count nothing
                counters[name].inc(value, labels)
        elif name in gauges:
            gauges[name].set(value, labels)
        else:
            histograms[name].observe(value, labels)

    return tell


def _last_error(name: str) -> str:
    """The last line of a replica's traceback, which Serve keeps in a deployment's status."""
    deployments = serve.status().applications[name].deployments.values()
    lines = [line.strip() for deployment in deployments for line in deployment.message.splitlines()]
    errors = [line for line in lines if "Error: " in line]
    return errors[-1] if errors else "see Ray's dashboard"


def _without_request_id(app: ASGIApp) -> ASGIApp:
    """Serve's proxy adds the header to every answer; the app's own would make it two."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                message = {**message, "headers": kept}
            await send(message)

        await app(scope, receive, send_without)

    return wrapped


def _quiet() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


def _check_listens(host: str, port: int) -> None:
    """A Serve that runs keeps its port, whatever is asked; through `ray://` its host is another: not checked."""
    if ray.util.client.ray.is_connected():
        return
    try:
        bind(host, port).close()
    except ResourceError:
        return
    raise ResourceError(f"Ray Serve runs on this cluster already, on another port than {port}: use that one")


def stop_app(name: str) -> None:
    """Drain the application; end Serve where it was the last one."""
    serve.delete(name)
    if not serve.status().applications:
        serve.shutdown()


def wait_while_running(name: str, stop_asked: Callable[[], bool]) -> None:
    """Block until asked to stop; raises ResourceError where the application is deleted or fails."""
    checked = time.monotonic()
    while not stop_asked():
        time.sleep(0.2)
        if time.monotonic() - checked > 10:
            checked = time.monotonic()
            application = serve.status().applications.get(name)
            if application is None or application.status == "DEPLOY_FAILED":
                raise ResourceError(
                    f"the Serve application {name} is gone or has failed; see Ray's dashboard"
                )
