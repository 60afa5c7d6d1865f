"""What several rooms' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for the whole session: its workers take about ten seconds to start."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, log_to_driver=False)
    yield
    ray.shutdown()
