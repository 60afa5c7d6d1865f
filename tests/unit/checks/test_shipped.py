"""The files that ship: no finding, and Ray's and Kubernetes' own schemas take them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fmray.checks.kuberay import kuberay_schema
from tests.unit.checks.conftest import Check
from tests.unit.checks.mutants import ROOT, SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_clean(path: Path, check: Check) -> None:
    assert [str(finding) for finding in check(path.read_text(encoding="utf-8"))] == []


def serve_configs() -> list[dict[str, Any]]:
    documents = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "serve_configs").glob("*.yaml"))]
    service = next(yaml.safe_load_all((ROOT / "cluster/rayservice.yaml").read_text()))
    return [*documents, yaml.safe_load(service["spec"]["serveConfigV2"])]


def test_ray_takes_the_serve_configs_and_loses_nothing() -> None:
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    for document in serve_configs():
        schema = ServeDeploySchema.model_validate(copy.deepcopy(document))
        assert [app.name for app in schema.applications] == [app["name"] for app in document["applications"]]
        for application in document["applications"]:
            for deployment in application["deployments"]:
                scaling = AutoscalingConfig(**deployment["autoscaling_config"])
                for key, value in deployment["autoscaling_config"].items():
                    assert getattr(scaling, key) == value


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])
def test_manifests_pass_the_crd_schema_in_an_independent_validator(name: str) -> None:
    schema = kuberay_schema()
    document = next(yaml.safe_load_all((ROOT / f"cluster/{name}.yaml").read_text()))
    kind = {**schema, **schema["$defs"][document["kind"]]}
    validator = jsonschema.Draft202012Validator(kind)
    assert [error.message for error in validator.iter_errors(document)] == []
    document["spec"]["rayVersoin"] = "2.60.0"
    assert any("rayVersoin" in error.message for error in validator.iter_errors(document))


def test_the_launcher_file_passes_rays_own_validation() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster/launcher.yaml").read_text())))


def test_the_names_of_start_parameters_are_those_of_ray() -> None:
    from ray.scripts.scripts import start

    options = {option.opts[-1].lstrip("-") for option in start.params}
    assert {*kuberay_schema()["$defs"]["RayStartParams"]["properties"]} == options
