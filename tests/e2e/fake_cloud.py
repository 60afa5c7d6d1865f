"""A cluster of its own on this machine whose nodes Ray's autoscaler starts and ends: declared GPUs, real raylets.

`ray stop` ends every Ray by name; here what was started is found by its own folder and ended by its id.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from ray.util import get_node_ip_address

from fmray.runtime.ports import free_port

RAY = Path(sys.executable).parent / "ray"


@contextmanager
def fake_cloud(
    folder: Path, *, node: dict[str, float], most: int, environment: dict[str, str]
) -> Iterator[str]:
    """Yields the address of a head without resources for replicas; up to `most` nodes of that kind come when asked for."""
    host = get_node_ip_address()
    # not in pytest's own folder: a socket's path may have 107 letters
    port, temporary = free_port(), Path(tempfile.mkdtemp(prefix="ray-"))
    address = f"{host}:{port}"
    config = folder / "cluster.json"
    config.write_text(json.dumps(_config(address, node, most)))
    command = [
        *(
            str(RAY),
            "start",
            "--head",
            "--block",
            f"--node-ip-address={host}",
            f"--port={port}",
            "--num-cpus=1",
            "--num-gpus=0",
        ),
        *("--include-dashboard=false", f"--temp-dir={temporary}", f"--autoscaling-config={config}"),
        "--disable-usage-stats",
    ]
    own = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",
    }
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            command, env={**os.environ, **own, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_up(address, head, folder)
        yield address
    finally:
        _end(head, str(temporary))
        shutil.rmtree(temporary, ignore_errors=True)


def _config(address: str, node: dict[str, float], most: int) -> dict[str, object]:
    lists = (
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    )
    return {
        "cluster_name": "fake",
        "max_workers": most,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": 1},
                "node_config": {},
                "max_workers": 0,
            },
            "gpu": {"resources": node, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 4.0,
        "idle_timeout_minutes": 0.1,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{name: [] for name in lists},
    }


def _wait_until_up(address: str, head: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, (folder / "head.log").read_text()
        if b"Ray runtime started" in (folder / "head.log").read_bytes():
            return
        time.sleep(0.5)
    raise AssertionError(f"no Ray at {address}: {(folder / 'head.log').read_text()}")


def _end(head: subprocess.Popen[bytes], temporary: str) -> None:
    """The head, and whatever runs in its folder."""
    head.send_signal(signal.SIGTERM)
    ours = [each for each in psutil.process_iter(["cmdline"]) if _within(each, temporary)]
    for process in ours:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(ours, timeout=20)
    try:
        head.wait(20)
    except subprocess.TimeoutExpired:
        head.kill()


def _within(process: psutil.Process, temporary: str) -> bool:
    return any(temporary in word for word in process.info["cmdline"] or [])
