"""Ray Serve's schema as the check reads it: taken from the installed Ray, tightened where Ray looks only later or never."""

from __future__ import annotations

from typing import Any

from fmray.runtime.ray_schemas import runtime_env_keys, serve_schema, uri_schemes

RENAMED = {
    "max_concurrent_queries": "max_ongoing_requests",
    "target_num_ongoing_requests_per_replica": "target_ongoing_requests",
    "target_num_ongoing_requests": "target_ongoing_requests",
    "target_ongoing_requests_per_replica": "target_ongoing_requests",
    "http_host": "host",
    "http_port": "port",
    "init_args": "args",
    "init_kwargs": "args",
    "root_url": "root_path",
}
"""Keys of older Rays, which this one drops without a word."""

LEVELS = ["CRITICAL", "FATAL", "ERROR", "WARNING", "WARN", "INFO", "DEBUG", "NOTSET"]
STRATEGIES = ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
SECONDS = {"type": "number", "exclusiveMinimum": 0}
RESOURCES = {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}, "x-guarded": True}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
NULL = {"type": "null"}
DEPRECATED = {
    "metrics_interval_s": "set RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S on the cluster instead",
    "smoothing_factor": "write upscaling_factor and downscaling_factor",
    "upscale_smoothing_factor": "write upscaling_factor",
    "downscale_smoothing_factor": "write downscaling_factor",
}


def tightened() -> dict[str, Any]:
    """The schema of a Serve config with Ray's later and unwritten rules in it."""
    schema = serve_schema()
    parts = schema["$defs"]
    schema["additionalProperties"] = False
    _top(schema["properties"], parts)
    _application(parts["ServeApplicationSchema"])
    _deployment(parts["DeploymentSchema"]["properties"])
    options = parts["RayActorOptionsSchema"]["properties"]
    options["runtime_env"] = runtime_env(remote=True)
    options["resources"] = RESOURCES
    options["label_selector"] = {"anyOf": [LABELS, NULL]}
    return schema


def _top(fields: dict[str, Any], parts: dict[str, Any]) -> None:
    http = parts["HTTPOptionsSchema"]
    http["properties"] |= {"port": PORT, "keep_alive_timeout_s": {"type": "integer", "minimum": 0}}
    http["properties"]["request_timeout_s"] = {"anyOf": [SECONDS, NULL]}
    http["x-elsewhere"] = {"location": "the top level, as proxy_location"}
    parts["gRPCOptionsSchema"]["properties"] |= {
        "port": PORT,
        "request_timeout_s": {"anyOf": [SECONDS, NULL]},
    }
    logs = parts["LoggingConfig"]["properties"]
    logs["encoding"] = {"type": "string", "enum": ["TEXT", "JSON"]}
    logs["log_level"] = {
        "anyOf": [{"type": "string", "enum": LEVELS}, {"type": "integer", "enum": [*range(0, 51, 10)]}]
    }
    parts["TracingConfig"]["properties"]["sampling_ratio"] = {"type": "number", "minimum": 0, "maximum": 1}
    parts["ControllerOptions"]["properties"]["runtime_env"] = {
        "anyOf": [{"type": "object", "properties": {"env_vars": variables()}}, NULL]
    }


def _application(schema: dict[str, Any]) -> None:
    fields = schema["properties"]
    for key in ("host", "port"):  # of a form with one application, refused in this one
        fields.pop(key, None)
    schema["x-elsewhere"] = dict.fromkeys(("host", "port"), "http_options, at the top level")
    fields["name"] = {"type": "string", "minLength": 1}
    says = "must begin with / , must not end with one (but for / itself), and hold no { or }"
    route = {"type": "string", "pattern": r"^/$|^/[^{}]*[^{}/]$", "x-says": says}
    fields["route_prefix"] = {"anyOf": [route, NULL]}
    fields["import_path"] = {"type": "string", "minLength": 1}
    fields["runtime_env"] = runtime_env(remote=True)


def _deployment(fields: dict[str, Any]) -> None:
    fields["name"] = {"type": "string", "minLength": 1}
    count = {"type": "integer", "minimum": 1}
    fields["num_replicas"] = {"anyOf": [count, {"type": "string", "enum": ["auto"]}, NULL]}
    fields["max_queued_requests"] = {"type": "integer", "minimum": -1}
    fields["max_replicas_per_node"] = {"anyOf": [{**count, "maximum": 100}, NULL]}
    fields["placement_group_strategy"] = {"type": "string", "enum": STRATEGIES}
    fields["placement_group_bundles"] = {"type": "array", "items": RESOURCES}
    scaling = fields["autoscaling_config"]["anyOf"][0]
    scaling["properties"]["aggregation_function"] = {"type": "string", "enum": ["mean", "max", "min"]}
    for key, cure in DEPRECATED.items():
        if key in scaling["properties"]:
            scaling["properties"][key] = {**scaling["properties"][key], "x-deprecated": cure}


def variables() -> dict[str, Any]:
    """Environment variables of a runtime_env: strings."""
    return {"type": "object", "additionalProperties": {"type": "string"}, "x-variables": True}


def runtime_env(*, remote: bool) -> dict[str, Any]:
    """A runtime_env; `remote`: its folders must be addresses, as Serve configs want."""
    schemes = "|".join(uri_schemes())
    says = (
        f"Serve takes only addresses here ({schemes.replace('|', '://, ')}://); upload the folder as a .zip"
    )
    folder = {"type": "string", "pattern": rf"^({schemes})://." if remote else ".", "x-says": says}
    texts = {
        "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}, {"type": "object"}]
    }
    named = {
        "working_dir": folder,
        "py_modules": {"type": "array", "items": folder},
        "env_vars": variables(),
        "pip": texts,
        "uv": texts,
        "conda": {"anyOf": [{"type": "object"}, {"type": "string"}]},
        "excludes": {"type": "array", "items": {"type": "string"}},
        "py_executable": {"type": "string"},
        "image_uri": {"type": "string"},
        "worker_process_setup_hook": {"type": "string"},
        "config": {
            "type": "object",
            "properties": {
                "setup_timeout_seconds": {"type": "integer", "minimum": -1},
                "eager_install": {"type": "boolean"},
            },
        },
    }
    return {"type": "object", "properties": {key: named.get(key, {}) for key in runtime_env_keys()}}
