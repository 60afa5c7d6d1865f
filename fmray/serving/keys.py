"""Keys of an endpoint: made and kept hashed in a file (`fmray keys`), and checked at every request."""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NoReturn

import yaml
from filelock import FileLock
from pydantic import Field, ValidationError

from fmray.config.base import Section
from fmray.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)

PREFIX = "fmray-"
"""So that scanners of repositories and logs can find a key that was spilt."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
LONGEST_KEY = 512
LOOK_AGAIN = 1.0
"""Seconds between two looks at the file."""


class KeyEntry(Section):
    """What is known of a key: never the key itself."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Hex digest. Unsalted and fast is enough: a key has 256 random bits, so there is nothing to guess."""
    created: str = ""
    """When, UTC; for people."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Of this key; None: what the endpoint's configuration says."""
    inputs_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Likewise."""


class KeyList(Section):
    """The whole file."""

    keys: dict[Annotated[str, Field(pattern=f"^{NAME.pattern}$")], KeyEntry] = Field(default={})
    """By name."""


# ---------------------------------------------------------------------------------------------------- the file


class KeyFile:
    """A YAML file of hashed keys: mode 600, replaced whole, one writer at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> KeyList:
        """Raises ConfigError where it is missing or is no key file; the message holds nothing of what is in it."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError("access.key_file", str(self.path), f"cannot be read: {reason}") from None
        try:
            return KeyList.model_validate(yaml.safe_load(text) or {})
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" (line {mark.line + 1})" if mark else ""
            raise ConfigError("access.key_file", str(self.path), f"is not YAML{where}") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ConfigError("access.key_file", str(self.path), f"{place}: {first['msg']}") from None

    def add(self, name: str, *, requests: int | None = None, inputs: int | None = None) -> str:
        """Make a key, keep its digest, return it: nobody can read it again. Raises ConfigError for a name in use."""
        if not NAME.fullmatch(name):
            raise ConfigError("keys add", name, "a name has letters, digits, '.', '_', '@', '-'; at most 64")
        key = PREFIX + secrets.token_urlsafe(32)
        entry = {
            "sha256": digest(key),
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "requests_per_minute": requests,
            "inputs_per_minute": inputs,
        }
        with self._lock():
            known = self.read().keys if self.path.exists() else {}
            if name in known:
                raise ConfigError(
                    "keys add", name, f"has a key in {self.path}; remove it, or take another name"
                )
            try:
                self._write({**known, name: KeyEntry.model_validate(entry)})
            except ValidationError as error:
                first = error.errors()[0]
                raise ConfigError(f"keys add: {first['loc'][0]}", first["input"], first["msg"]) from None
        return key

    def remove(self, name: str) -> None:
        """Raises ConfigError where no key has the name."""
        with self._lock():
            known = self.read().keys
            if name not in known:
                raise ConfigError(
                    "keys remove", name, f"no such key; there are: {', '.join(known) or 'none'}"
                )
            self._write({other: entry for other, entry in known.items() if other != name})

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(f"{self.path}.lock", mode=0o600)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise ConfigError("keys --file", str(self.path), f"cannot be locked: {error.strerror}") from None
        try:
            yield
        finally:
            lock.release()

    def _write(self, keys: dict[str, KeyEntry]) -> None:
        """Readers see the old file or the new one. mkstemp makes it mode 600, which `replace` keeps."""
        rows = {name: entry.model_dump(exclude_none=True) for name, entry in keys.items()}
        try:
            handle, scratch = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write("# Keys of an fmray endpoint, hashed. Written by `fmray keys`.\n")
                yaml.safe_dump({"keys": rows}, stream, sort_keys=False)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(scratch, self.path)
        except OSError as error:
            raise ConfigError("keys --file", str(self.path), f"cannot be written: {error.strerror}") from None


def digest(key: str) -> str:
    """SHA-256 of a key, in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


# ------------------------------------------------------------------------------------------------- at the border


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose key it was. `Holder("alice", requests_per_minute=600, inputs_per_minute=None)`"""

    name: str
    requests_per_minute: int | None
    inputs_per_minute: int | None


class Access:
    """Who may ask. The file is looked at again at most once a second, so that keys come and go without a restart."""

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError where the file cannot be used: an endpoint does not start with keys that it cannot read."""
        self._file = KeyFile(path)
        self._seen = self._signature()
        self._holders = _by_digest(self._file.read())
        self._looked = time.monotonic()

    def holder(self, authorization: Sequence[str]) -> Holder:
        """Whose key is in these `Authorization` headers; raises RequestError(401).

        Found by its digest in a dict: what time this takes tells of a digest that the asker cannot steer towards another
        one, and nothing of a key. The comparison of the digests themselves is constant-time all the same.
        """
        self._look()
        if not authorization:
            message = "this endpoint needs a key: send it as `Authorization: Bearer KEY`"
            raise RequestError(401, "missing_api_key", message)
        scheme, _, key = authorization[0].strip().partition(" ")
        key = key.strip()
        if len(authorization) > 1 or scheme.lower() != "bearer" or not key:
            message = "send one Authorization header, of the form `Bearer KEY`"
            raise RequestError(401, "invalid_api_key", message)
        asked = digest(key) if len(key) <= LONGEST_KEY else ""
        known, holder = self._holders.get(asked, ("", None))
        if holder is None or not hmac.compare_digest(asked, known):
            raise RequestError(401, "invalid_api_key", "this key is not known here")
        return holder

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_AGAIN:
            return
        self._looked = now
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature  # of a broken file too: it is told once
        try:
            self._holders = _by_digest(self._file.read())
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
        else:
            logger.warning("keys read again from %s: %d", self._file.path, len(self._holders))

    def _signature(self) -> tuple[int, ...] | None:
        """Changes with the file; through links, since Kubernetes swaps a link below a mounted secret."""
        try:
            facts = os.stat(self._file.path)
        except OSError:
            return None
        return facts.st_mtime_ns, facts.st_size, facts.st_ino, facts.st_dev


def _by_digest(keys: KeyList) -> dict[str, tuple[str, Holder]]:
    return {
        entry.sha256: (entry.sha256, Holder(name, entry.requests_per_minute, entry.inputs_per_minute))
        for name, entry in keys.keys.items()
    }


# ----------------------------------------------------------------------------------------------- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("keys", message, "--help shows how it is asked")


def run_keys(arguments: Sequence[str]) -> list[str]:
    """`add NAME --file FILE`, `list --file FILE`, `remove NAME --file FILE`: the lines to say. Raises ConfigError."""
    parser = _Parser(prog="fmray keys", description="Keys of an endpoint, kept hashed in a file.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    add = verbs.add_parser("add", help="make a key, print it once, keep its SHA-256")
    remove = verbs.add_parser("remove", help="end a key; running endpoints notice within a second")
    listing = verbs.add_parser("list", help="names and limits")
    for verb in (add, remove):
        verb.add_argument("name", help="whose key it is; this is what logs call them")
    for verb in (add, remove, listing):
        verb.add_argument("--file", required=True, help="the file that access.key_file names")
    for limit in ("requests", "inputs"):
        about = f"{limit} of this key; left out: what the endpoint's configuration says"
        add.add_argument(f"--{limit}-per-minute", type=int, help=about)
    given = parser.parse_args(list(arguments))
    file = KeyFile(given.file)
    if given.verb == "add":
        key = file.add(given.name, requests=given.requests_per_minute, inputs=given.inputs_per_minute)
        return [key]
    if given.verb == "remove":
        file.remove(given.name)
        return [f"{given.name}: removed"]
    return [
        f"{name:<24}{entry.created:<24}{_told(entry.requests_per_minute, 'requests')}"
        f"{_told(entry.inputs_per_minute, 'inputs')}".rstrip()
        for name, entry in file.read().keys.items()
    ]


def _told(limit: int | None, what: str) -> str:
    return "" if limit is None else f"{limit} {what}/min  "
