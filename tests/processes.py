"""Jobs as processes of their own: started, waited for, killed by the tests that need that; and what their runs left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from fmray.runtime.run_folder import RunFolder

ROOT = Path(__file__).parent.parent


def start_job(job: str, config: Path | str, *overrides: str) -> subprocess.Popen[str]:
    """`python jobs/<job>.py --config <config> …`; tests' own modules can be named in the configuration."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--config", str(config), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for its end, which must be a good one."""
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output


def wait_for_step(folder: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run in <folder>/runs/<name> has reported the step."""
    run, deadline = RunFolder(f"{folder}/runs/{name}"), time.monotonic() + 120
    while not any(line["step"] >= step for line in run.metrics()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)


def state(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    """The weights and moments of a checkpoint, of all ranks; copies, not the mapped files."""
    checkpoint = folder / "runs" / name / "checkpoints" / f"step-{step:08d}" / "state"
    files = sorted(checkpoint.glob("tensors-*.safetensors"))
    return {key: value.clone() for path in files for key, value in load_file(path).items()}


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same names, the same bits."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
