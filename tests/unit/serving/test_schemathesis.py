"""schemathesis against the document of an endpoint with all models: fitting and unfitting requests, every check that applies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi import checks as openapi_checks

from fmray.serving.opening import Endpoint
from tests.endpoint import serving
from tests.unit.serving import schemathesis_hooks as hooks
from tests.whole_endpoint import whole_config

HERE = Path(__file__).parent
REPLACED = ("positive_data_acceptance", "unsupported_method")
"""By checks of ours, which know what no schema can say (`schemathesis_hooks`)."""
CHECKS = [
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
    hooks.refused_for_a_reason,
    hooks.every_error_is_ours,
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = whole_config(tmp_path_factory.mktemp("whole"), max_body_mib=1)
    with serving(Endpoint(config).app) as url:
        yield url


def test_a_sample(url: str) -> None:
    """A few requests for every route, half of them against the document."""
    schema, asked = schemathesis.openapi.from_url(f"{url}/openapi.json"), 0
    for result in schema.get_all_operations():
        operation = result.ok()
        modes = [GenerationMode.POSITIVE]
        if operation.body:
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:

            @settings(
                max_examples=2,
                database=None,
                deadline=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Case) -> None:
                nonlocal asked
                asked += 1
                case.call_and_validate(checks=CHECKS)

            ask()
    assert asked > 25


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_route_with_every_check(url: str) -> None:
    """schemathesis' own program: examples, all boundaries of every field, and random bodies."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--checks", "all", "--exclude-checks", ",".join(REPLACED), "--mode", "all"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "20"),
        *("--generation-deterministic", "--no-color"),
    ]
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": hooks.__name__.rpartition(".")[2],
        "PYTHONPATH": str(HERE),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 13" in done.stdout, done.stdout
