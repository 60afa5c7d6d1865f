"""An ASGI app on Ray Serve: one application, N replicas, each building the app for itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import ProxyLocation
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fmray.errors import ResourceError
from fmray.runtime.ports import bind
from fmray.runtime.ray_cluster import require_resources


def run_app(
    build: Callable[[], FastAPI], *, name: str, replicas: int, host: str, port: int, cpus: float, gpus: float
) -> None:
    """Deploy the app that `build` makes inside each replica, and return once it answers; inside `connected`.

    Raises ResourceError: the port is taken, the cluster is too small, or the replicas do not come up.
    """
    wanted = {"CPU": replicas * cpus} | ({"GPU": replicas * gpus} if gpus else {})
    require_resources(wanted, f"replicas={replicas}", "lower replicas")
    if serve.status().proxies:
        _check_listens(host, port)
    else:
        bind(host, port).close()
        options = {"host": host, "port": port}
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=_quiet())

    def build_in_replica() -> ASGIApp:  # Serve takes a function, no other callable
        return _without_request_id(build())

    replica: Any = serve.ingress(build_in_replica)()
    deployment = serve.deployment(replica).options(
        name=name,
        num_replicas=replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        logging_config=_quiet(),
    )
    try:
        serve.run(deployment.bind(), name=name, route_prefix="/")
    except RuntimeError:
        reason = _last_error(name)
        stop_app(name)
        raise ResourceError(f"Ray Serve could not start {name}: {reason}") from None


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
