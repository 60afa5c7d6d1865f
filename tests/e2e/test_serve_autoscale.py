"""Replicas and nodes follow the traffic: 1 → 4 → 0 → 1, Ray's own autoscaler, and no request is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.endpoint import save_tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_an_endpoint_scales_to_four_nodes_to_none_and_back(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    checkpoint = save_tiny_checkpoint(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.autoscale_scene", checkpoint, str(tmp_path)],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},  # a `ray start` without a token file
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    timeline = json.loads((tmp_path / "timeline.json").read_text())
    assert timeline["failed"] == []
    assert timeline["answered"] > 50
    replicas = [row["replicas"] for row in timeline["rows"]]
    nodes = [row["nodes"] for row in timeline["rows"]]
    assert max(replicas) == max(nodes) == 4
    full = replicas.index(4)
    assert replicas.index(1) < full
    empty = next(place for place in range(full, len(replicas)) if replicas[place] == 0)
    assert 0 in nodes[empty:]
    assert replicas[-1] == 1
