"""A run's home on a local disk or any fsspec URL, and what stands in it.

<storage>/<name>/
    config.json          the resolved configuration
    metrics.jsonl        one line per report
    checkpoints/step-00000100/…   (training/checkpoint.py)
    stop                 present: the run should save and end
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from fmray.config.schema import RunConfig
from fmray.errors import ConfigError


@dataclass(frozen=True)
class RunFolder:
    """`RunFolder.of(RunConfig(name="demo"))`; paths inside are relative to it. Picklable: it travels to workers."""

    url: str

    @classmethod
    def of(cls, run: RunConfig) -> RunFolder:
        """The folder of a named run; a local storage becomes absolute, so that workers elsewhere find it."""
        storage = run.storage if "://" in run.storage else str(Path(run.storage).expanduser().absolute())
        return cls(f"{storage.rstrip('/')}/{run.name}")

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def filesystem(self) -> Any:
        """fsspec's filesystem that holds the folder."""
        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except (ImportError, ValueError) as error:
            raise ConfigError("run.storage", self.url, f"cannot be opened: {error}") from None

    def path(self, *parts: str) -> str:
        """The path that `filesystem` understands."""
        root = fsspec.core.url_to_fs(self.url)[1]
        return "/".join([str(root).rstrip("/"), *parts])

    def exists(self, *parts: str) -> bool:
        return bool(self.filesystem.exists(self.path(*parts)))

    def read_text(self, *parts: str) -> str:
        return str(self.filesystem.cat_file(self.path(*parts)).decode("utf-8"))

    def write_text(self, text: str, *parts: str) -> None:
        """Replace a small file whole: readers see the old or the new text, never half of it."""
        target = self.path(*parts)
        self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        if self.is_local:
            draft = Path(f"{target}.{time.time_ns()}.draft")
            draft.write_text(text, encoding="utf-8")
            draft.replace(target)
        else:
            self.filesystem.pipe_file(target, text.encode("utf-8"))

    def remove(self, *parts: str) -> None:
        """Delete a file or folder if it is there."""
        if self.exists(*parts):
            self.filesystem.rm(self.path(*parts), recursive=True)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        if not self.exists("metrics.jsonl"):
            return []
        lines = self.read_text("metrics.jsonl").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]
