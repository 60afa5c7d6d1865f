"""The indexes that an endpoint searches: opened when it starts, replaced while it runs, never half of one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fmray.errors import CheckpointError, DataError, RequestError
from fmray.manifest import MANIFEST
from fmray.serving.index_store import PictureIndex, open_index

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the manifests are looked at."""
AGAIN_SECONDS = 30.0
"""How long an index that could not be read is left alone, unless its manifest changes."""
OPEN_ATTEMPTS = 3
"""How often a manifest that changes while its index is read is followed, before it is left for the next look."""

Stamp = tuple[int, int, int]
"""A file's inode, time of change in nanoseconds and size: other ones, another manifest."""


def _stamp(folder: Path) -> Stamp | None:
    try:
        seen = (folder / MANIFEST).stat()
    except OSError:
        return None
    return seen.st_ino, seen.st_mtime_ns, seen.st_size


@dataclass(slots=True)
class _Place:
    """Where an index lies, what was last read there, and what was last wrong with it."""

    folder: Path
    index: PictureIndex
    stamp: Stamp | None
    complaint: str = ""
    not_before: float = 0.0


class IndexShelf:
    """Indexes by name. `with IndexShelf({"photos": "runs/index"}, served={checkpoint_hash(folder): 512}) as shelf: …`

    `served`: content hash and width of every dual encoder that answers queries; looked at again for every new index.
    Opening raises CheckpointError or DataError where an index cannot be used. Inside `with` (or between `start` and `close`)
    a thread looks at the manifests; a new index is read beside the old one and then takes its place in one assignment, so
    that a search runs on one of the two from beginning to end. One that cannot be used leaves the old one, and a line in the log.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        *,
        served: Mapping[str, int],
        look_seconds: float = LOOK_SECONDS,
        again_seconds: float = AGAIN_SECONDS,
    ) -> None:
        self._served = served
        self._look_seconds, self._again_seconds = look_seconds, again_seconds
        self._places = {name: self._open(Path(folder).expanduser()) for name, folder in folders.items()}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> IndexShelf:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to look for new indexes."""
        if self._places and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="indexes", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the looking; what is open can still be searched."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(5)

    @property
    def names(self) -> list[str]:
        """The names, in the order of the configuration."""
        return list(self._places)

    def get(self, name: str | None) -> tuple[str, PictureIndex]:
        """An index and its name; None: the only one there is. Raises RequestError with `param="index"`."""
        if not self._places:
            message = "no index is served here; build one with fmray index, and start the endpoint with indexes.NAME=FOLDER"
            raise RequestError(404, "index_not_found", message, "index")
        if name is None:
            if len(self._places) > 1:
                message = f"index: name one of {', '.join(self._places)}"
                raise RequestError(400, "missing_required_parameter", message, "index")
            name = next(iter(self._places))
        if name not in self._places:
            message = f"there is no index {name[:100]!r}; there are: {', '.join(self._places)}"
            raise RequestError(404, "index_not_found", message, "index")
        return name, self._places[name].index

    # ------------------------------------------------------------------------------------------------ a new index

    def _open(self, folder: Path) -> _Place:
        """Read what the manifest names; once more where another one took its place meanwhile."""
        for _ in range(OPEN_ATTEMPTS - 1):
            stamp = _stamp(folder)
            try:
                return _Place(folder, open_index(folder, served=self._served), stamp)
            except (DataError, CheckpointError):
                if _stamp(folder) == stamp:
                    raise
        stamp = _stamp(folder)
        return _Place(folder, open_index(folder, served=self._served), stamp)

    def _watch(self) -> None:
        while not self._ended.wait(self._look_seconds):
            for name in self._places:
                self._look(name)

    def _look(self, name: str) -> None:
        place = self._places[name]
        stamp = _stamp(place.folder)
        if stamp == place.stamp and not (place.complaint and time.monotonic() >= place.not_before):
            return
        try:
            self._places[name] = self._open(place.folder)
        except (DataError, CheckpointError, MemoryError) as error:
            if str(error) != place.complaint:
                logger.warning("index %s stays as it was: %s", name, error)
            place.stamp, place.complaint = stamp, str(error)
            place.not_before = time.monotonic() + self._again_seconds
        else:
            logger.info("index %s is new: %d pictures", name, self._places[name].index.facts.count)
