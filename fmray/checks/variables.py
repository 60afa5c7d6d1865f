"""Environment variables that manifests set: which of them something reads."""

from __future__ import annotations

import difflib
from functools import cache

from fmray.runtime.ray_schemas import serve_variables


@cache
def _serve_variables() -> tuple[str, ...]:
    return tuple(serve_variables())


OUR_VARIABLES = ("FMRAY_CACHE", "FMRAY_OFFLINE")
"""Those of fmray (config/loading.py)."""
RAY_VARIABLES = (
    *("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_RUNTIME_ENV_HOOK"),
    *("RAY_REDIS_ADDRESS", "RAY_REDIS_USERNAME", "RAY_enable_autoscaler_v2", "RAY_memory_usage_threshold"),
    *("RAY_GRAFANA_HOST", "RAY_GRAFANA_IFRAME_HOST", "RAY_PROMETHEUS_HOST", "RAY_PROMETHEUS_NAME"),
    *("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "RAY_gcs_rpc_server_reconnect_timeout_s"),
)
"""Of Ray's many others, those that manifests set; a name near one of them is taken for a slip of it."""
OTHER_VARIABLES = (
    "OMP_NUM_THREADS",
    "PYTHONUNBUFFERED",
    "PYTHONPATH",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
)


def strange_variable(name: str) -> str | None:
    """A cure for an environment variable that nothing reads: it looks like one of Serve's, Ray's or ours, and is none."""
    known = (*_serve_variables(), *OUR_VARIABLES, *RAY_VARIABLES, *OTHER_VARIABLES)
    if name in known:
        return None
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    if near:
        return f"did you mean {near[0]}?"
    if name.startswith("RAY_SERVE_"):
        return "look the name up in Ray Serve's list of variables"
    return "fmray reads " + " and ".join(OUR_VARIABLES) if name.startswith("FMRAY_") else None
