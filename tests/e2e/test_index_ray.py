"""The same index on Ray Data: equal to the local one, picture by picture, and refused in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmray.config.index import IndexConfig
from fmray.config.loading import validate
from fmray.errors import DataError, ResourceError
from fmray.pipeline.index import build_index
from fmray.serving.index_store import open_index
from tests.endpoint import picture, save_tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COLORS = ("black", "blue", "green", "orange", "red")


def configs(place: Path, **changes: Any) -> tuple[IndexConfig, IndexConfig]:
    """The same index in this process and on Ray Data, one actor or two."""
    for color in COLORS:
        for number in range(4):
            file = place / "pictures" / color / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(color, (20 + 5 * number, 24)))
    (place / "pictures" / "blue" / "1.png").write_bytes(picture()[:60])
    keys = {
        "checkpoint": save_tiny_checkpoint(place / "clip"),
        "source": {"path": str(place / "pictures")},
        "batch_size": 3,
        "max_bad_share": 0.1,
        "progress": False,
        **changes,
    }
    local = validate(IndexConfig, keys | {"output": str(place / "local")})
    runtime = {"kind": "ray", "workers": [1, 2]}
    return local, validate(IndexConfig, keys | {"output": str(place / "ray"), "runtime": runtime})


def test_local_and_ray_are_one_index(ray_session: None, tmp_path: Path) -> None:
    local, on_ray = configs(tmp_path)
    here, there = build_index(local), build_index(on_ray)
    assert here.facts is not None
    assert there.facts is not None
    assert (here.left_out, there.left_out) == (1, 1)
    first, second = open_index(tmp_path / "local"), open_index(tmp_path / "ray")
    assert first.keys == second.keys
    assert len(first.keys) == 19
    np.testing.assert_allclose(first._vectors_ND, second._vectors_ND, atol=1e-6)
    for name in ("pictures.parquet", "thumbnails.bin"):
        assert here.facts.files[name] == there.facts.files[name]
    left_out = [(tmp_path / name / "left_out.txt").read_text() for name in ("local", "ray")]
    assert left_out[0] == left_out[1]


def test_a_mistake_on_ray_ends_in_the_same_line(ray_session: None, tmp_path: Path) -> None:
    local, on_ray = configs(tmp_path, max_bad_share=0.0)
    lines = []
    for config in (local, on_ray):
        with pytest.raises(DataError) as error:
            build_index(config)
        lines.append(str(error.value).replace(config.output, "OUTPUT"))
    assert lines[0] == lines[1]
    with pytest.raises(
        ResourceError, match=r"runtime.workers=400 and a task that decodes need 401 CPU, but the cluster"
    ):
        build_index(on_ray.replace(runtime=on_ray.runtime.replace(workers=400)))
