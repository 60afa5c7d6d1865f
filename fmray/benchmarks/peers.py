"""Peers that fmray is measured against: an isolated environment for each, and the processes of both sides.

Both sides answer questions over their standard streams (`open_clip_side/answering.py`), so that each stays warm while the
other is measured: runs alternate A B A B in one go, and what the machine does meanwhile hits both.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock

from fmray.errors import ResourceError

SCRIPTS = Path(__file__).parent
STAMP = "made.json"


@dataclass(frozen=True, slots=True)
class PeerEnvironment:
    """A virtual environment of its own. `OPEN_CLIP.python(Path(".parity"))` makes it once and returns its interpreter."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    """Arguments of one `pip install` after the other."""

    def python(self, root: Path) -> Path:
        """The interpreter; about a minute the first time. Raises ResourceError with pip's last line."""
        folder = (root / self.name).absolute()
        recipe, python = json.dumps(self.installs), folder / "bin" / "python"
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{self.name}.lock"):
            stamp = folder / STAMP
            if stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe:
                return python
            shutil.rmtree(folder, ignore_errors=True)
            sys.stderr.write(f"· making {folder} …\n")
            venv.create(folder, with_pip=True)
            for packages in self.installs:
                self._install(python, packages)
            stamp.write_text(recipe, encoding="utf-8")
        return python

    def _install(self, python: Path, packages: tuple[str, ...]) -> None:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ResourceError(f"the environment of {self.name} cannot be made: {last}")


OPEN_CLIP = PeerEnvironment(
    "open_clip",
    (
        ("torch==2.13.0",),  # first and alone: the others would take another build of it
        (
            "--no-deps",
            *("open-clip-torch==3.3.0", "timm", "ftfy", "regex", "tqdm", "safetensors", "wcwidth", "pillow"),
            "torchvision==0.28.0",  # its open range asks for a CUDA build of torch
        ),
        ("numpy", "pyyaml", "huggingface_hub", "pandas", "webdataset", "braceexpand"),
    ),
)

TRL_0_11 = PeerEnvironment(  # the last trl whose PPO takes encoder-decoder policies
    "trl-0.11.4",
    (
        ("torch==2.13.0",),
        (
            *("trl==0.11.4", "transformers==4.46.3", "accelerate<1.3", "datasets<3.2"),
            *("numpy>=2,<2.3", "rich", "safetensors"),
        ),
    ),
)

TRL_1_12 = PeerEnvironment(  # the last trl with a PPO at all
    "trl-1.12.0",
    (("torch==2.13.0",), ("trl==1.12.0", "transformers==5.23.0", "safetensors")),
)


@dataclass(slots=True)
class Side:
    """A process that answers: `with Side("ours", [python, …], threads=2) as ours: ours.ask("steps", count=3)`."""

    name: str
    command: list[str]
    threads: int
    _process: subprocess.Popen[str] | None = None
    _log: Any = None

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(self.threads),
        )
        return self

    def ask(self, question: str, **arguments: Any) -> Any:
        """The answer; raises ResourceError with the last line that the process printed where it has ended."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"ask": question, **arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["it printed nothing"])[-1]
            raise ResourceError(f"{self.name} ended at '{question}': {last}")
        return json.loads(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.close()  # the end of the questions is the end of the process
            process.wait(30)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            process.kill()
            process.wait()
        self._log.close()


def environment(threads: int) -> dict[str, str]:
    """This process's variables with the same number of threads for everyone, without our import path and our process group."""
    ours = {
        "PYTHONPATH",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_peer_script(python: Path, script: str, *arguments: str, threads: int = 1) -> None:
    """`trl_side/ppo_0_11.py` or another peer's script to its end; raises ResourceError with its last line where it fails."""
    command = [str(python), str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(threads))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ResourceError(f"{script} failed: {last}")


def open_clip_side(python: Path, threads: int) -> Side:
    """open_clip's process."""
    return Side("open_clip", [str(python), str(SCRIPTS / "open_clip_side" / "train.py")], threads)


def our_side(threads: int) -> Side:
    """A process of fmray."""
    return Side("fmray", [sys.executable, "-m", "fmray.benchmarks.our_side"], threads)


def trl_side(python: Path, threads: int) -> Side:
    """trl 0.11.4's process."""
    return Side("trl", [str(python), str(SCRIPTS / "trl_side" / "ppo_speed.py")], threads)


def ppo_side(threads: int) -> Side:
    """A process of fmray that answers questions about PPO."""
    return Side("fmray", [sys.executable, "-m", "fmray.benchmarks.ppo_side"], threads)


def held_side(config: str, threads: int) -> Side:
    """A PPO run of fmray, one iteration for each question."""
    return Side("fmray", [sys.executable, "-m", "fmray.benchmarks.ppo_held", config], threads)


@dataclass(frozen=True, slots=True)
class Measured:
    """Repeats of one figure, in one unit."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def shown(self, unit: str, digits: int = 3) -> str:
        """`1.23 s (1.20–1.31, n=5)`"""
        low, high = min(self.values), max(self.values)
        return f"{self.median:.{digits}g} {unit} ({low:.{digits}g}–{high:.{digits}g}, n={len(self.values)})"
