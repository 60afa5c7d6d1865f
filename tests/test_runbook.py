"""What the runbook says is true: keys, files, panels, variables and the commands of others exist."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from fmray.config.base import Section
from fmray.config.serving import BatchConfig, ScaleConfig, ServeConfig
from fmray.serving.deploy import BATCH, PROXY_BORDER, _options
from tests.dashboards import panels

ROOT = Path(__file__).parent.parent
RUNBOOK = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
TICKED = re.findall(r"`([^`\n]+)`", RUNBOOK)
BLOCKS = re.findall(r"```\n(.*?)```", RUNBOOK, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line]


def keys(section: type[Section], prefix: str = "") -> set[str]:
    found = set()
    for name, field in section.model_fields.items():
        found.add(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                found |= keys(kind, f"{prefix}{name}.")
    return found


def test_keys_of_the_configuration_exist() -> None:
    pytest.importorskip("ray")
    known = keys(ServeConfig)
    sections = {key.partition(".")[0] for key in known if "." in key}
    named = [word for word in TICKED if re.fullmatch(rf"({'|'.join(sections)})\.[a-z_.]+(=\S+)?", word)]
    assert len(set(named)) > 20
    for word in named:
        assert word.partition("=")[0] in known, word
    serves = json.dumps(_serves_own())
    for word in {word for word in TICKED if re.fullmatch(r"(max|library)_[a-z_]+", word)} - {"max_tokens"}:
        assert word in known or f'"{word}"' in serves, word


def _serves_own() -> dict[str, Any]:
    from fmray.runtime.ray_schemas import serve_schema

    return serve_schema()


def test_keys_of_serves_own_exist() -> None:
    pytest.importorskip("ray")
    schema = json.dumps(_serves_own())
    for key in (
        *("max_ongoing_requests", "max_queued_requests", "backpressure_config", "retry_after_s"),
        *("request_timeout_s", "keep_alive_timeout_s", "proxy_location", "tracing_config"),
        *("exporter_import_path", "sampling_ratio", "rolling_update_percentage", "max_surge_percent"),
        *("graceful_shutdown_timeout_s", "look_back_period_s", "upscale_delay_s", "downscale_delay_s"),
        *("downscale_to_zero_delay_s", "target_ongoing_requests", "min_replicas", "max_replicas"),
    ):
        assert key in RUNBOOK
        assert f'"{key}"' in schema, key


def test_figures_are_the_defaults() -> None:
    batch, scale, config = BatchConfig(), ScaleConfig(), ServeConfig(checkpoint="x", scale=ScaleConfig())
    options = _options(config)
    target = options["autoscaling_config"]["target_ongoing_requests"]
    assert f"`scale.load` ({scale.load:g}) × `batch.max_items` ({BATCH}) = {target:g}" in RUNBOOK
    assert f"`batch.deadline_seconds` ({batch.deadline_seconds:g})" in RUNBOOK
    assert f"`batch.queue_items` ({batch.queue_items})" in RUNBOOK
    assert options["max_ongoing_requests"] == batch.queue_items
    assert f"`max_body_mib` ({config.max_body_mib})" in RUNBOOK
    assert f"`look_back_period_s`, {scale.look_back_seconds:g}" in RUNBOOK
    delays = f"`upscale_delay_s` {scale.upscale_seconds:g}, `downscale_delay_s` {scale.downscale_seconds:g}"
    assert delays in RUNBOOK
    assert f"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH={PROXY_BORDER}" in RUNBOOK


def test_shipped_files_are_as_the_runbook_asks() -> None:
    for file in (ROOT / "serve_configs").glob("*.yaml"):
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert f"({config['http_options']['keep_alive_timeout_s']})" in RUNBOOK
        for application in config["applications"]:
            [deployment] = application["deployments"]
            for keys_of in (application["args"], deployment["user_config"]):
                deadline = keys_of.get("batch", {}).get("deadline_seconds", BatchConfig().deadline_seconds)
                assert config["http_options"]["request_timeout_s"] > deadline, file.name
            assert deployment["max_queued_requests"] > 0
            assert deployment["backpressure_config"]["status_code"] == 429
            assert deployment["user_config"]["checkpoint"] == application["args"]["checkpoint"]


def test_panels_and_files_exist() -> None:
    titles = {panel["title"] for panel in panels()}
    for title in (
        *("Requests per second", "Items held", "Waiting for the model", "The model", "Preparing an item"),
        *("Items of a batch", "Replicas", "Ready", "Failures of replicas"),
    ):
        assert title in titles
        assert f"*{title}*" in RUNBOOK
    for path in re.findall(
        r"\b((?:cluster|serve_configs|fmray|docs)/[\w/.-]+\.(?:yaml|json|py|md))", RUNBOOK
    ):
        assert (ROOT / path).exists(), path


def test_variables_are_read_by_somebody() -> None:
    pytest.importorskip("ray")
    from fmray.checks.variables import strange_variable

    named = set(re.findall(r"\b(RAY_[A-Z_]+)\b", RUNBOOK))
    assert len(named) >= 4
    for name in named:
        assert strange_variable(name) is None, name


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(("serve ", "ray "))])
def test_commands_of_ray_parse(line: str) -> None:
    pytest.importorskip("ray")
    import click
    from ray.scripts.scripts import cli as ray_cli
    from ray.serve.scripts import cli as serve_cli

    program, *words = shlex.split(line)
    command: click.Command = {"serve": serve_cli, "ray": ray_cli}[program]
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    words = [str(ROOT / word) if word.endswith(".yaml") else word for word in words]
    command.make_context("x", words)  # raises for what it does not know


def test_other_programs_are_few() -> None:
    """Whatever is in a block is checked here, in test_readme.py, or stands in this list."""
    rest = [line for line in LINES if not line.startswith(("serve ", "ray ", "fmray ", "export "))]
    assert {line.split()[0] for line in rest} == {"kubectl", "promtool", "prometheus"}


def test_ray_brings_the_commands_of_the_text() -> None:
    if find_spec("ray") is None:
        pytest.skip("needs ray")
    from ray.scripts.scripts import cli as ray_cli
    from ray.serve.scripts import cli as serve_cli

    for word in TICKED:
        program, _, rest = word.partition(" ")
        if program in ("ray", "serve") and rest:
            known = (ray_cli if program == "ray" else serve_cli).commands
            assert rest.split()[0] in known, word
