"""Every error a user of fmray can meet, in one tree; each also is the standard type callers expect.

FmrayError
 ├─ ConfigError (ValueError)      a key, its value, the cure
 ├─ DataError (ValueError)        a sample or a data set that cannot be used
 ├─ AssetError (OSError)          a pinned download that is missing or altered
 ├─ CheckpointError (OSError)     a checkpoint that is missing, truncated, altered or of another model
 ├─ ResourceError (RuntimeError)  more CPUs, GPUs, disk or ports than there are
 ├─ PoolError (RuntimeError)      an actor pool that does not answer; names pool, replica and phase
 ├─ SweepError (RuntimeError)     a sweep of which every trial failed; holds the first one's error
 ├─ RewardError (RuntimeError)    a reward that raised, timed out or was no number; names reward and sample
 ├─ MissingExtra (ImportError)    an optional package; names the extra that brings it
 └─ RequestError (ValueError)     an HTTP request that cannot be answered; carries its status code

The command line prints the message alone (`fmray.cli.door`): a person's mistake ends in one line, no traceback.
"""

from __future__ import annotations

from importlib.util import find_spec

TEMPORARY_FAILURE = 75
"""Exit status of a run that was told to stop and has saved: sysexits.h's EX_TEMPFAIL, so schedulers retry it."""


class FmrayError(Exception):
    """Root of the tree."""


class ConfigError(FmrayError, ValueError):
    """A configuration value that cannot be used. `ConfigError("train.steps", -1, "must be at least 1")`."""

    def __init__(self, key: str, value: object, cure: str) -> None:
        super().__init__(f"{key}={value!r}: {cure}")
        self.key, self.value, self.cure = key, value, cure

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        return type(self), (self.key, self.value, self.cure)  # picklable: it crosses Ray's processes


class DataError(FmrayError, ValueError):
    """A data set or a sample that cannot be used; the message names it."""


class AssetError(FmrayError, OSError):
    """A pinned asset that could not be fetched or does not have its checksum."""


class CheckpointError(FmrayError, OSError):
    """A checkpoint that is missing, truncated, altered, or of another model."""


class ResourceError(FmrayError, RuntimeError):
    """More CPUs, GPUs, disk or ports than this machine or cluster has."""


class PoolError(FmrayError, RuntimeError):
    """A pool did not answer in time, or has no replica left; the message names pool, replica and phase."""


class RewardError(FmrayError, RuntimeError):
    """A reward that raised, timed out or returned NaN, beyond its budget; the message holds the sample."""


class SweepError(FmrayError, RuntimeError):
    """Every trial of a sweep failed; the message holds the first one's error."""


class MissingExtra(FmrayError, ImportError):
    """An optional package is not installed. `MissingExtra("deepspeed", "deepspeed", "engine.kind=deepspeed")`."""

    def __init__(self, package: str, extra: str, needed_by: str) -> None:
        super().__init__(f"{needed_by} needs {package}, which is not installed: pip install 'fmray[{extra}]'")
        self.package, self.extra, self.needed_by = package, extra, needed_by

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str]]:
        return type(self), (self.package, self.extra, self.needed_by)


def require_package(package: str, extra: str, needed_by: str) -> None:
    """Raises MissingExtra where a package cannot be imported; does not import it."""
    if find_spec(package) is None:
        raise MissingExtra(package, extra, needed_by)


class RequestError(FmrayError, ValueError):
    """An HTTP request that cannot be answered, with what the OpenAI error body needs.

    `RequestError(400, "invalid_image", "input[3] is not an image", param="input[3]")`
    `retry_after`: seconds after which it is worth while to ask again (429, 503, 504); None: it is not said.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        *,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after
