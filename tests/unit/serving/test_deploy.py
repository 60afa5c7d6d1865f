from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fmray.config.schema import RuntimeConfig
from fmray.config.serving import ServeConfig
from fmray.errors import CheckpointError, ResourceError
from fmray.runtime.ports import bind, free_port
from fmray.serving.deploy import serve


def test_a_port_in_use_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ResourceError, match=f"^port {port} on 127.0.0.1 is in use; choose another"
        ) as caught:
            serve(ServeConfig(checkpoint="/nowhere", port=port))
        assert "\n" not in str(caught.value)


def test_addresses_that_cannot_be_listened_on() -> None:
    with pytest.raises(ResourceError, match=r"port 9 on 192\.0\.2\.1 cannot be had"):
        bind("192.0.2.1", 9)
    with pytest.raises(ResourceError, match=r"host 'no\.such\.host\.invalid' cannot be listened on"):
        bind("no.such.host.invalid", 8000)


def test_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        serve(ServeConfig(checkpoint=str(tmp_path), port=free_port()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "kind", "extra"),
    [("fastapi", "local", "serve"), ("uvicorn", "ray", "serve"), ("ray", "ray", "ray")],
)
def test_a_missing_package_names_its_extra(package: str, kind: str, extra: str) -> None:
    """In a process where the package cannot be found, as where it was never installed."""
    program = f"""
import importlib.abc, importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find_spec(name, *rest)
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from fmray.config.schema import RuntimeConfig
from fmray.config.serving import ServeConfig
from fmray.errors import MissingExtra
from fmray.serving.deploy import serve
try:
    serve(ServeConfig(checkpoint="/nowhere", runtime=RuntimeConfig(kind={kind!r})))
except MissingExtra as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert f"needs {package}, which is not installed: pip install 'fmray[{extra}]'" in done.stdout, (
        done.stderr
    )


@pytest.mark.ray
@pytest.mark.slow
def test_more_than_the_cluster_has_is_said_at_once(ray_session: None, checkpoint: str) -> None:
    runtime = RuntimeConfig(kind="ray", cpus_per_worker=99)
    with pytest.raises(
        ResourceError, match=r"the replicas of fmray-clip need 99 CPU, but the cluster has \d"
    ):
        serve(ServeConfig(checkpoint=checkpoint, runtime=runtime, port=free_port()))


@pytest.mark.ray
@pytest.mark.slow
def test_a_taken_port_is_one_line_on_ray_too(ray_session: None, checkpoint: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServeConfig(
            checkpoint=checkpoint, runtime=RuntimeConfig(kind="ray"), port=taken.getsockname()[1]
        )
        with pytest.raises(ResourceError, match=r"^port \d+ on 127.0.0.1 is in use"):
            serve(config)
