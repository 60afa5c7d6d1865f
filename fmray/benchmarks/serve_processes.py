"""The processes of `fmray benchmark serve`: an endpoint on a core of its own, the load generator on another.

With one core, or where the system cannot bind a process to cores, all share what there is; the table's notes say so.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fmray.benchmarks.peers import PeerEnvironment, Side, environment
from fmray.errors import ResourceError
from fmray.runtime.ports import free_port

SCRIPTS = Path(__file__).parent
START_SECONDS = 180.0
"""In which an endpoint must answer."""
MEBIBYTE = 1 << 20

INFINITY = PeerEnvironment(
    "infinity-0.0.78",
    (
        ("torch==2.13.0",),
        ("--no-deps", "torchvision==0.28.0"),  # its open range asks for a CUDA build of torch
        ("infinity-emb[server,torch,vision]==0.0.78", "transformers<5", "torch==2.13.0", "aiohttp"),
    ),
)


def cores() -> tuple[int, int] | None:
    """The server's and the load generator's; None where nothing can be bound, or there is one core."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[-1], allowed[0]) if len(allowed) > 1 else None


@dataclass(slots=True)
class Server:
    """An endpoint of its own: `with Server("fmray", [python, …], port=8000, ready="/ready") as server: …`"""

    name: str
    command: list[str]
    port: int
    ready: str
    """The path that answers 200 once it serves."""
    core: int | None = None
    variables: dict[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _log: Any = None

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+b")
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment(1) | self.variables,
        )
        if self.core is not None:  # before it has a thread; children and threads inherit it
            os.sched_setaffinity(self._process.pid, {self.core})
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                last = self._last_line()
                self.__exit__(None, None, None)
                raise ResourceError(f"{self.name} does not serve: {last}")
            time.sleep(0.1)
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """It still runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def resident_mib(self) -> float:
        """What it holds of the machine's memory now."""
        return _status(self.pid, "VmRSS")

    @property
    def peak_mib(self) -> float:
        """The most it has held since its start."""
        return _status(self.pid, "VmHWM")

    @property
    def cpu_seconds(self) -> float:
        """Of CPU that it has used since its start, its ended children's not counted."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _answers(self) -> bool:
        try:
            return get(self.port, self.ready)[0] == 200
        except OSError:
            return False

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        assert process is not None
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body; raises OSError where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from None
    finally:
        connection.close()


def _status(pid: int, key: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return 0.0


# ----------------------------------------------------------------------------------------------------------------- who serves


def our_server(
    model: Path, core: int | None, *settings: str, variables: dict[str, str] | None = None
) -> Server:
    """`fmray serve` in local mode with one torch thread; settings: `batch.max_items=1`, …"""
    port = free_port()
    command = [sys.executable, "-m", "fmray.cli", "serve", f"checkpoint={model}", f"port={port}"]
    command += ["runtime.threads=1", "runtime.device=cpu", "model_id=served", *settings]
    return Server("fmray serve", command, port, "/ready", core, variables or {})


def plain_server(model: Path, core: int | None) -> Server:
    """FastAPI and transformers as people put them together, in our own environment."""
    port = free_port()
    command = [sys.executable, "-m", "fmray.benchmarks.serve_plain", str(model), str(port)]
    return Server("FastAPI + transformers", command, port, "/health", core)


def infinity_server(model: Path, root: Path, core: int | None) -> tuple[Server, dict[str, str]]:
    """Infinity's own command on torch, batches of up to 32 as ours; and its versions."""
    python, port = infinity_python(root), free_port()
    command = [
        str(python.parent / "infinity_emb"),
        "v2",
        "--model-id",
        str(model),
        "--served-model-name",
        "served",
    ]
    command += [
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--engine",
        "torch",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    command += ["--batch-size", "32", "--no-model-warmup", "--log-level", "error"]
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    return Server("Infinity", command, port, "/health", core, offline), versions_in(python)


def infinity_python(root: Path) -> Path:
    """Its interpreter. PyPI's torchvision imports beside a CPU build of torch once its missing kernels are declared."""
    python = INFINITY.python(root)
    packages = next((python.parent.parent / "lib").glob("python3*")) / "site-packages"
    shim = "torchvision_without_kernels"
    (packages / f"{shim}.py").write_bytes((SCRIPTS / "open_clip_side" / f"{shim}.py").read_bytes())
    (packages / f"{shim}.pth").write_text(f"import {shim}\n", encoding="ascii")
    return python


def versions_in(
    python: Path, packages: Sequence[str] = ("infinity-emb", "torch", "transformers")
) -> dict[str, str]:
    """Of another environment's packages."""
    code = "import sys, importlib.metadata as m; print(*(m.version(name) for name in sys.argv[1:]))"
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    return dict(zip(packages, done.stdout.split(), strict=True))


def bare_side() -> Side:
    """The engine without an endpoint around it."""
    return Side("the bare engine", [sys.executable, "-m", "fmray.benchmarks.serve_bare"], 1)
