"""What the installed Ray says of its own files: the schemas that it validates with, and its verdict on a file."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import ray
from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.serve import config as serve_config
from ray.serve.schema import ServeDeploySchema

RAY_VERSION: str = ray.__version__

jsonschema: Any = importlib.import_module("jsonschema")
"""Ray's own dependency; it brings no types."""

SERVE_SECTIONS: dict[str, type[BaseModel]] = {
    "autoscaling_config": serve_config.AutoscalingConfig,
    "request_router_config": serve_config.RequestRouterConfig,
    "gang_scheduling_config": serve_config.GangSchedulingConfig,
}
"""Sections of a deployment that Serve's schema lets be any mapping; it reads them later, when it deploys."""


def serve_schema() -> dict[str, Any]:
    """JSON schema of a Serve config (`serve deploy FILE`), the sections in it that Ray reads late included."""
    with _quietly():
        schema: dict[str, Any] = ServeDeploySchema.model_json_schema()
        parts = {name: model.model_json_schema() for name, model in SERVE_SECTIONS.items()}
        actor = serve_config.DeploymentActorConfig.model_json_schema()
    for part in [*parts.values(), actor]:
        schema["$defs"].update(part.pop("$defs", {}))
    fields = schema["$defs"]["DeploymentSchema"]["properties"]
    for name, part in parts.items():
        fields[name] = {"anyOf": [part, {"type": "null"}]}
    fields["deployment_actors"] = {"anyOf": [{"type": "array", "items": actor}, {"type": "null"}]}
    return schema


def runtime_env_keys() -> list[str]:
    """The keys of a runtime_env, Ray's internal ones left out."""
    return sorted(name for name in RuntimeEnv.known_fields if not name.startswith("_") or name == "_nsight")


def uri_schemes() -> list[str]:
    """What a working_dir of a Serve config may begin with: `s3`, `gs`, `https`, `local`, …"""
    module = importlib.import_module("ray._private.runtime_env.protocol")
    return sorted(str(member.value) for member in module.Protocol)


def serve_variables() -> list[str]:
    """Environment variables that Serve reads, `RAY_SERVE_…`, as its constants name them."""
    text = (Path(ray.__file__).parent / "serve/_private/constants.py").read_text(encoding="utf-8")
    return sorted({*re.findall(r'"(RAY_SERVE_[A-Z0-9_]+)"', text)})


def launcher_schema() -> dict[str, Any]:
    """JSON schema of a cluster-launcher file (`ray up FILE`)."""
    path = Path(ray.__file__).parent / "autoscaler/ray-schema.json"
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


def serve_verdict(document: dict[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    """What Serve's own schema refuses: place and sentence. Classes named in the file are not imported."""
    document = copy.deepcopy(document)
    for application in document.get("applications", ()):
        for deployment in application.get("deployments", ()):
            for key in (
                "request_router_config",
                "deployment_actors",
            ):  # validating them imports what they name
                deployment.pop(key, None)
            scaling = deployment.get("autoscaling_config")
            if isinstance(scaling, dict):
                scaling.pop("policy", None)
    with _quietly():
        try:
            ServeDeploySchema.model_validate(document)
            for application in document.get("applications", ()):
                for deployment in application.get("deployments", ()):
                    serve_config.AutoscalingConfig.model_validate(deployment.get("autoscaling_config") or {})
        except ValidationError as error:
            return [(detail["loc"], _sentence(detail["msg"])) for detail in error.errors()]
    return []


def launcher_verdict(document: dict[str, Any]) -> tuple[tuple[str | int, ...], str] | None:
    """What `ray up` would refuse before it asks a cloud for anything: place and sentence; None: nothing."""
    said = io.StringIO()
    with _quietly(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            validate_config(prepare_config(copy.deepcopy(document)))
        except jsonschema.ValidationError as error:
            return tuple(error.absolute_path), _sentence(error.message)
        except click.ClickException:  # Ray's own word for it went to the terminal
            return (), _sentence(said.getvalue())
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError) as error:
            return (), _sentence(f"{type(error).__name__}: {error}")
    return None


def _sentence(text: str) -> str:
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).removeprefix("Value error, ").split())
    return text[:200]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
