"""A folder with a manifest: which files belong to it, their sizes and SHA-256 sums.

The manifest is written last, so a folder without one was never finished; a file that does not match is named.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from fmray.errors import CheckpointError

MANIFEST = "manifest.json"
_STEP = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True, slots=True)
class FileSum:
    """`FileSum("model/config.json", 812, "9f86d081…")`, the path relative to the folder."""

    path: str
    size: int
    sha256: str


def sum_file(path: Path, relative_to: Path) -> FileSum:
    """Size and checksum of a local file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileSum(path.relative_to(relative_to).as_posix(), path.stat().st_size, digest)


def manifest_text(step: int, files: list[FileSum]) -> str:
    """The manifest's JSON."""
    table = {f.path: {"size": f.size, "sha256": f.sha256} for f in sorted(files, key=lambda f: f.path)}
    return json.dumps({"format": 1, "step": step, "files": table}, indent=1) + "\n"


def verify(filesystem: Any, folder: str) -> int:
    """Check every file of a folder on any fsspec filesystem; returns the step, raises CheckpointError with the file."""
    path = f"{folder}/{MANIFEST}"
    if not filesystem.exists(path):
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it was never finished")
    try:
        content = json.loads(filesystem.cat_file(path))
        step, files = int(content["step"]), dict(content["files"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: is not a manifest; the checkpoint cannot be trusted") from None
    for name, expected in files.items():
        _verify_file(filesystem, folder, name, expected)
    return step


def _verify_file(filesystem: Any, folder: str, name: str, expected: dict[str, Any]) -> None:
    target = f"{folder}/{name}"
    if ".." in name.split("/") or name.startswith("/"):
        raise CheckpointError(f"{folder}/{MANIFEST}: names a file outside the checkpoint: {name}")
    if not filesystem.exists(target):
        raise CheckpointError(f"{target}: is missing")
    size = filesystem.size(target)
    if size != expected["size"]:
        raise CheckpointError(
            f"{target}: is truncated or altered ({size} bytes, {expected['size']} expected)"
        )
    digest = hashlib.sha256()
    with filesystem.open(target, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{target}: is altered (its checksum differs from the manifest's)")


def step_folders(filesystem: Any, checkpoints: str) -> list[str]:
    """Checkpoint folders under `checkpoints`, newest first, finished or not."""
    if not filesystem.exists(checkpoints):
        return []
    names = [str(path).rstrip("/").rpartition("/")[2] for path in filesystem.ls(checkpoints, detail=False)]
    return [f"{checkpoints}/{name}" for name in sorted(filter(_STEP.match, names), reverse=True)]


def newest_good(filesystem: Any, checkpoints: str) -> tuple[str | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was passed over."""
    passed_over = []
    for folder in step_folders(filesystem, checkpoints):
        try:
            verify(filesystem, folder)
        except CheckpointError as error:
            passed_over.append(str(error))
            continue
        return folder, passed_over
    return None, passed_over


def find_model_folder(location: str) -> str:
    """The model inside a model folder, a checkpoint folder or a run folder, as a path or URL.

    Raises CheckpointError where there is none, or where the checkpoint it would take does not verify.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{location}: cannot be opened: {error}") from None
    path = str(path).rstrip("/")
    scheme = f"{location.partition('://')[0]}://" if "://" in location else ""
    if filesystem.exists(f"{path}/config.json") and filesystem.exists(f"{path}/model.safetensors"):
        return scheme + path
    if filesystem.exists(f"{path}/checkpoints"):
        folder, passed_over = newest_good(filesystem, f"{path}/checkpoints")
        if folder is None:
            reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
            raise CheckpointError(f"{location}: the run has no finished checkpoint{reasons}")
        return f"{scheme}{folder}/model"
    if filesystem.exists(f"{path}/model/config.json"):
        verify(filesystem, path)
        return f"{scheme}{path}/model"
    what = "holds no model, checkpoint or run" if filesystem.exists(path) else "no such folder"
    raise CheckpointError(f"{location}: {what}")
