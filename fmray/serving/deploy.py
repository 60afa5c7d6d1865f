"""The door of serving: a saved model behind a port, in this process or on Ray Serve."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fmray.config.loading import validate
from fmray.config.serving import ServeConfig
from fmray.errors import require_package
from fmray.manifest import find_model_folder
from fmray.runtime.context import stop_on_sigterm
from fmray.runtime.ports import bind

if TYPE_CHECKING:
    from fmray.serving.opening import Endpoint

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30
"""What requests in flight are given when the endpoint is told to stop."""

PROXY_BORDER = "fmray.serving.proxy_border.middlewares"
"""What stands around Serve's own proxy."""
BATCH = 32
"""Items of a batch where the configuration names none."""


def serve(config: ServeConfig, announce: Callable[[str], None] = logger.info) -> None:
    """Serve `config.checkpoint` until SIGTERM or SIGINT, then end cleanly; `announce` is told where, once it answers.

    May raise MissingExtra, CheckpointError or ResourceError (port in use, cluster too small) before that.
    """
    require_package("fastapi", "serve", "serving")
    require_package("uvicorn", "serve", "serving")
    if config.runtime.kind == "ray":
        require_package("ray", "ray", "runtime.kind=ray")
        _serve_on_ray(config, announce)
    else:
        _serve_here(config, announce)


def app(args: dict[str, Any]) -> Any:
    """What Serve configurations import (`fmray.serving.deploy:app`): an application of one deployment, named `Model`.

    args: the keys of `ServeConfig`, nested as in a file. Raises ConfigError that names the key.
    """
    from fmray.runtime import ray_serve

    config = validate(ServeConfig, args)
    return ray_serve.application(partial(open_replica, config), _options(config))


def open_replica(config: ServeConfig) -> Endpoint:
    """The endpoint of one replica; what it counts goes to Ray's exporter too, and limits hold over all replicas."""
    from fmray.runtime import ray_serve
    from fmray.runtime.ray_limits import RayLedger
    from fmray.serving.metrics import METRICS
    from fmray.serving.opening import Endpoint

    ledger = RayLedger(str(config.model_id)) if config.access.limited else None
    return Endpoint(config, ray_serve.metrics_sink(METRICS), ledger)


def _options(config: ServeConfig) -> dict[str, Any]:
    """Serve's options of the deployment; a configuration file's own lie over them.

    The app refuses by itself (429) what its queue has no room for, so a replica takes whatever comes: Serve's own limit would let
    requests wait where nobody counts their bytes or their time.
    """
    batch = config.batch.max_items or BATCH
    options: dict[str, Any] = {
        "max_ongoing_requests": max(2 * batch, config.batch.queue_items),
        "ray_actor_options": {
            "num_cpus": config.runtime.cpus_per_worker,
            "num_gpus": config.runtime.gpus_per_worker,
        },
        "graceful_shutdown_timeout_s": GRACE_SECONDS,
        "health_check_period_s": 10,
        "health_check_timeout_s": 30,
    }
    if config.scale is None:
        return options | {"num_replicas": config.replicas}
    scale = config.scale
    return options | {
        "autoscaling_config": {
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.load * batch,
            "look_back_period_s": scale.look_back_seconds,
            "upscale_delay_s": scale.upscale_seconds,
            "downscale_delay_s": scale.downscale_seconds,
        }
    }


def _serve_here(config: ServeConfig, announce: Callable[[str], None]) -> None:
    import uvicorn

    from fmray.serving.connections import uvicorn_settings
    from fmray.serving.opening import Endpoint

    with bind(config.host, config.port) as bound:  # before the model: a port in use is known at once
        endpoint = Endpoint(config)
        settings = uvicorn.Config(
            endpoint.app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS, **uvicorn_settings()
        )
        announce(_where(endpoint.config))
        with (
            stop_on_sigterm()
        ):  # uvicorn raises the signal again once it has drained: our handler lets that pass
            uvicorn.Server(settings).run(sockets=[bound])


def _serve_on_ray(config: ServeConfig, announce: Callable[[str], None]) -> None:
    from fmray.runtime import ray_limits, ray_serve
    from fmray.runtime.ray_cluster import connected
    from fmray.serving.opening import kind_of

    # found once, as absolute paths: replicas have another working folder, and must not differ in what they load
    more = {name: find_model_folder(place) for name, place in config.more.items()}
    config = config.replace(checkpoint=find_model_folder(config.checkpoint), more=more)
    config = config.named(kind_of(config.checkpoint))
    name = str(config.model_id)
    # read by Serve's proxies, which inherit it from the Ray that starts here; a cluster sets it on every node
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", PROXY_BORDER)
    # the signals after Ray, whose own handler would end the process
    with connected(config.runtime.address), stop_on_sigterm() as stop_asked:
        ray_serve.run_app(
            ray_serve.application(partial(open_replica, config), _options(config)),
            name=name,
            host=config.host,
            port=config.port,
            wanted=_wanted(config),
        )
        try:
            announce(_where(config))
            ray_serve.wait_while_running(name, stop_asked)
        finally:
            ray_serve.stop_app(name)
            ray_limits.end(name)


def _where(config: ServeConfig) -> str:
    address = f"http://{config.host}:{config.port}"
    page = f"; a page to try it: {address}/" if config.page else ""
    return f"serving {', '.join(config.places)} on {address}/v1{page}"


def _wanted(config: ServeConfig) -> dict[str, float]:
    """What the cluster must have from the beginning."""
    replicas = config.replicas if config.scale is None else config.scale.min_replicas
    runtime = config.runtime
    gpus = {"GPU": replicas * runtime.gpus_per_worker} if runtime.gpus_per_worker else {}
    return {"CPU": replicas * runtime.cpus_per_worker} | gpus
