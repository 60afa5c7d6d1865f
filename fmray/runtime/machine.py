"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores, system and date."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [
            line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")
        ]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }


def load_average() -> str:
    """Runnable processes over the last one and five minutes: whether others were at work too."""
    one, five, _ = os.getloadavg()
    return f"{one:.1f} and {five:.1f}"


def versions() -> dict[str, str]:
    """Of what a run stands on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("fmray", "torch", "transformers", "ray", "deepspeed", "openai"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
