"""The demo's endpoints: `fmray serve` as a user would start it, and the client that a stranger would ask it with."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fmray.config.base import RuntimeConfig
from fmray.errors import MissingExtra, ResourceError
from fmray.runtime.ports import free_port

if TYPE_CHECKING:
    from openai import OpenAI


@contextmanager
def endpoint(folder: Path, runtime: RuntimeConfig, model_id: str) -> Iterator[str]:
    """A run's model served in a process of its own, on Ray where the run was; yields its address once it answers."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "fmray.cli", "serve", f"checkpoint={folder}", f"port={port}"),
        *(f"model_id={model_id}", f"runtime.kind={runtime.kind}"),
    ]
    with (folder / "serve.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(address, process, folder / "serve.log")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_healthy(
    address: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 120
) -> None:
    """Until /health answers; raises ResourceError with the server's last line where it does not."""
    import httpx

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.25)
    last = (log.read_text(encoding="utf-8").strip().splitlines() or ["nothing was printed"])[-1]
    raise ResourceError(f"the endpoint did not come up: {last} (whole log: {log})")


def client_of(address: str) -> OpenAI:
    """The unmodified OpenAI client. Raises MissingExtra where it is not installed."""
    try:
        from openai import OpenAI
    except ImportError:
        raise MissingExtra("openai", "dev", "the demo's client") from None
    return OpenAI(base_url=f"{address}/v1", api_key="none")
