"""An index of pictures on disk and in memory: checked when it is read, searched by a vector.

    OUTPUT/manifest.json            what there is, replaced in one step when a new index is complete
    OUTPUT/v-<16 hex>/index.faiss   unit vectors, exact or with a graph of neighbours
    OUTPUT/v-<16 hex>/pictures.parquet   key, captions and length of the thumbnail, in the order of the vectors
    OUTPUT/v-<16 hex>/thumbnails.bin     JPEG files, one after the other

N pictures  D width of the shared space
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Final, Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmray.errors import CheckpointError, DataError, require_package
from fmray.manifest import MANIFEST, find_model_folder

FORMAT: Final = 1
VECTORS, PICTURES, THUMBNAILS = "index.faiss", "pictures.parquet", "thumbnails.bin"
COLUMNS = pa.schema(
    [("key", pa.string()), ("captions", pa.list_(pa.string())), ("thumbnail_bytes", pa.int32())]
)
CHECKPOINT_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
"""What decides a picture's vector: the model, its weights, how a picture is prepared (where that is a file of its own)."""

LONGEST_KEY = 1024
LONGEST_CAPTION = 4096
MOST_CAPTIONS = 256
LARGEST_THUMBNAIL = 1 << 18
LARGEST_MANIFEST = 1 << 16
ROWS_AT_ONCE = 1 << 16
"""Vectors that are looked at together where all are looked at."""
NORM_TOLERANCE = 1e-3
_UNCLEAN = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileFacts(BaseModel):
    """A file's size in bytes and SHA-256 sum."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class IndexFacts(BaseModel):
    """The manifest: what a reader can know of an index before it opens a file of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
    format: Literal[1]
    version: Annotated[str, Field(pattern=r"^v-[0-9a-f]{16}$")]
    """Name of the folder that holds the files."""
    checkpoint: Sha256
    """Content hash of the model that made the vectors (`checkpoint_hash`)."""
    kind: Literal["flat", "hnsw"]
    dim: Annotated[int, Field(ge=1, le=1 << 16)]
    count: Annotated[int, Field(ge=1, le=1 << 30)]
    links: Annotated[int, Field(ge=0, le=256)]
    """Neighbours of a vector in the graph; 0 for `flat`."""
    search: Annotated[int, Field(ge=0, le=4096)]
    """Candidates held while the graph is searched; 0 for `flat`."""
    thumbnail: Annotated[int, Field(ge=0, le=512)]
    """Side of the thumbnails in pixels; 0: there are none."""
    built_at: Annotated[int, Field(ge=0)]
    """Seconds since 1970."""
    files: dict[str, FileFacts]


@dataclass(frozen=True, slots=True)
class Hit:
    """`Hit(row=17, key="dog/1.png", score=0.31, caption="a dog")`: a found picture and its cosine."""

    row: int
    key: str
    score: float
    caption: str | None


def faiss_library(needed_by: str) -> Any:
    """faiss, or MissingExtra that names the extra."""
    require_package("faiss", "search", needed_by)
    import faiss

    return faiss


def checkpoint_hash(location: str) -> str:
    """SHA-256 over a saved dual encoder's configuration, weights and preparation; the same wherever they lie.

    Raises CheckpointError where there is no model.
    """
    filesystem, folder = fsspec.core.url_to_fs(find_model_folder(location))
    whole = hashlib.sha256()
    for name in CHECKPOINT_FILES:
        if filesystem.exists(f"{folder}/{name}"):
            with filesystem.open(f"{folder}/{name}", "rb") as stream:
                whole.update(f"{name} {_sha256(stream)}\n".encode())
    return whole.hexdigest()


def _sha256(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def why_not_a_key(key: str) -> str | None:
    """What is wrong with a key; None where nothing is. Clients may put keys behind a folder's name or an address."""
    if not key or len(key) > LONGEST_KEY:
        return f"its key must have 1 to {LONGEST_KEY} characters"
    if _UNCLEAN.search(key):
        return "its key holds a control character, a backslash or half a surrogate pair"
    if key.startswith("/") or ".." in key.split("/"):
        return "its key must be a relative path without '..'"
    return None


# ------------------------------------------------------------------------------------------------------ reading


def read_facts(folder: Path) -> IndexFacts:
    """The manifest of an index; raises DataError in one line."""
    path = folder / MANIFEST
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST_MANIFEST + 1)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): not an index, or not finished; build one with fmray index"
        ) from None
    if len(content) > LARGEST_MANIFEST:
        raise DataError(f"{path}: has more than {LARGEST_MANIFEST} bytes; it is not an index's manifest")
    try:
        facts = IndexFacts.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: is not an index's manifest ({where}: {first['msg']})") from None
    if set(facts.files) != {VECTORS, PICTURES, THUMBNAILS}:
        raise DataError(f"{path}: is not an index's manifest (files: not the three of an index)")
    return facts


def open_index(folder: Path, *, served: Mapping[str, int] | None = None) -> PictureIndex:
    """A finished index in memory. `served`: the models that queries can come from, content hash to width; None: any.

    Raises CheckpointError where another model made it, DataError where anything of it is damaged, MissingExtra without faiss.
    """
    facts = read_facts(folder)
    if served is not None and facts.checkpoint not in served:
        there = " and ".join(made[:12] for made in served) or "none"
        raise CheckpointError(
            f"{folder}: was made by checkpoint {facts.checkpoint[:12]}, served is {there}; "
            "build it again with fmray index and the served checkpoint"
        )
    if served is not None and facts.dim != served[facts.checkpoint]:
        width = served[facts.checkpoint]
        raise CheckpointError(f"{folder}: holds vectors of width {facts.dim}, and its model's have {width}")
    place = folder / facts.version
    with _checked(place, VECTORS, facts) as stream:
        vectors = _read_vectors(place / VECTORS, stream, facts)
    with _checked(place, PICTURES, facts) as stream:
        keys, captions, lengths = _read_pictures(place / PICTURES, stream, facts)
    with _checked(place, THUMBNAILS, facts) as stream:
        if sum(lengths) != facts.files[THUMBNAILS].size:
            raise DataError(f"{place / THUMBNAILS}: does not hold what {PICTURES} says")
        thumbnails = os.dup(stream.fileno())
    return PictureIndex(facts, vectors, keys, captions, thumbnails, lengths)


def _checked(place: Path, name: str, facts: IndexFacts) -> IO[bytes]:
    """A file whose size and sum are the manifest's, open: what is read next is what was summed."""
    path, expected = place / name, facts.files[name]
    try:
        stream = path.open("rb")
        try:
            size = os.fstat(stream.fileno()).st_size
            if size != expected.size:
                raise DataError(f"{path}: is truncated or altered ({size} bytes, {expected.size} expected)")
            if _sha256(stream) != expected.sha256:
                raise DataError(f"{path}: is altered (its checksum differs from the manifest's)")
            stream.seek(0)
        except (DataError, OSError):
            stream.close()
            raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return stream


def _read_vectors(path: Path, stream: IO[bytes], facts: IndexFacts) -> Any:
    """The faiss index, if it is of the kind, size and width that the manifest says, its vectors finite and of norm 1."""
    faiss = faiss_library("searching an index of pictures")
    least = 4 * facts.dim * facts.count
    graph = facts.count * (16 * facts.links + 64) if facts.kind == "hnsw" else 0
    if not least <= facts.files[VECTORS].size <= least + graph + 4096:
        raise DataError(f"{path}: has not the size of {facts.count} vectors of width {facts.dim}")
    try:
        index = faiss.read_index(faiss.PyCallbackIOReader(stream.read, 1 << 22))
    except (RuntimeError, MemoryError):
        raise DataError(f"{path}: is not a faiss index") from None
    if not _is_of_kind(index, facts.kind):
        raise DataError(f"{path}: is not a {facts.kind} index of inner products")
    vectors_ND = vectors_of(index)
    if vectors_ND.shape != (facts.count, facts.dim) or index.ntotal != facts.count:
        raise DataError(
            f"{path}: holds {index.ntotal} vectors of width {index.d}, not what the manifest says"
        )
    for start in range(0, facts.count, ROWS_AT_ONCE):
        norms = np.linalg.norm(vectors_ND[start : start + ROWS_AT_ONCE], axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))  # so that NaN is wrong too
        if len(wrong):
            row = start + int(wrong[0])
            raise DataError(f"{path}: the vector of row {row} has norm {norms[row - start]:.3g}, not 1")
    return index


def _is_of_kind(index: Any, kind: str) -> bool:
    faiss = faiss_library("searching an index of pictures")
    if kind == "flat":
        return isinstance(index, faiss.IndexFlatIP)
    return isinstance(index, faiss.IndexHNSWFlat) and isinstance(
        faiss.downcast_index(index.storage), faiss.IndexFlatIP
    )


def vectors_of(index: Any) -> NDArray[np.float32]:
    """A flat or HNSW index's own vectors, float32 [N, D]: a view, valid while the index lives."""
    faiss = faiss_library("searching an index of pictures")
    flat = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSWFlat) else index
    view: NDArray[np.float32] = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d)
    return view.reshape(flat.ntotal, flat.d)


def _read_pictures(
    path: Path, stream: IO[bytes], facts: IndexFacts
) -> tuple[list[str], list[tuple[str, ...]], list[int]]:
    """Keys, captions and lengths of thumbnails, every one within its bounds."""
    keys: list[str] = []
    captions: list[tuple[str, ...]] = []
    lengths: list[int] = []
    same: dict[str, str] = {}
    try:
        for batch in _batches(path, stream, facts):
            for row in batch.to_pylist():
                if row["key"] is None or why_not_a_key(row["key"]) is not None:
                    raise DataError(
                        f"{path}: row {len(keys)} has an unusable key: {why_not_a_key(row['key'] or '')}"
                    )
                texts = row["captions"] or []
                if len(texts) > MOST_CAPTIONS or any(t is None or len(t) > LONGEST_CAPTION for t in texts):
                    raise DataError(f"{path}: row {len(keys)} has captions beyond the bounds")
                if not 0 <= (row["thumbnail_bytes"] or 0) <= LARGEST_THUMBNAIL:
                    raise DataError(f"{path}: row {len(keys)} has a thumbnail beyond the bounds")
                keys.append(row["key"])
                captions.append(tuple(same.setdefault(text, text) for text in texts))
                lengths.append(row["thumbnail_bytes"] or 0)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError):
        raise DataError(f"{path}: cannot be read as Parquet") from None
    if len(set(keys)) != len(keys):
        raise DataError(f"{path}: some keys stand there twice")
    return keys, captions, lengths


def _batches(path: Path, stream: IO[bytes], facts: IndexFacts) -> Iterator[Any]:
    file = pq.ParquetFile(stream)
    if not file.schema_arrow.equals(COLUMNS):
        raise DataError(f"{path}: has not the columns of an index")
    if file.metadata.num_rows != facts.count:
        raise DataError(f"{path}: has {file.metadata.num_rows} rows, {facts.count} expected")
    yield from file.iter_batches(batch_size=4096)


# ---------------------------------------------------------------------------------------------------- searching


class PictureIndex:
    """An index in memory; any number of threads may search it at the same time. Thumbnails stay on the disk."""

    def __init__(
        self,
        facts: IndexFacts,
        vectors: Any,
        keys: list[str],
        captions: list[tuple[str, ...]],
        thumbnails: int,
        lengths: list[int],
    ) -> None:
        self.facts, self.keys, self.captions = facts, keys, captions
        self._faiss, self._vectors = faiss_library("searching an index of pictures"), vectors
        self._vectors_ND = vectors_of(vectors)
        self._sorted_rows = sorted(range(len(keys)), key=keys.__getitem__)
        self._sorted_keys = [keys[row] for row in self._sorted_rows]
        self._by_caption: dict[str, list[int]] = {}
        for row, texts in enumerate(captions):
            for text in texts:
                self._by_caption.setdefault(text, []).append(row)
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._thumbnails = thumbnails
        weakref.finalize(self, os.close, thumbnails)  # once the last search that uses it has ended

    def search(
        self,
        query_D: NDArray[np.float32],
        top_k: int,
        *,
        prefix: str = "",
        captions: Sequence[str] | None = None,
    ) -> list[Hit]:
        """The pictures nearest to a unit vector, best first: among those whose key starts with `prefix` and that have
        one of the captions, where these are given. Equal scores: the earlier picture first.

        With either the pictures left over are compared one by one, exactly, whatever the kind of the index.
        """
        query_D = np.ascontiguousarray(query_D, dtype=np.float32)
        top_k = min(top_k, self.facts.count)
        if prefix or captions is not None:
            scores, rows = self._among(self._rows(prefix, captions), query_D, top_k)
        else:
            options = {}
            if self.facts.kind == "hnsw":
                held = max(self.facts.search, top_k)
                options["params"] = self._faiss.SearchParametersHNSW(efSearch=held)
            found = self._vectors.search(query_D[None], top_k, **options)
            scores, rows = found[0][0], found[1][0]
        pairs = sorted((-float(s), int(r)) for s, r in zip(scores, rows, strict=True) if r >= 0)
        return [Hit(r, self.keys[r], -s, next(iter(self.captions[r]), None)) for s, r in pairs]

    def thumbnail(self, row: int) -> bytes | None:
        """A picture's small JPEG; None where it has none, or the file was cut off after it was checked."""
        end = int(self._ends[row])
        start = int(self._ends[row - 1]) if row else 0
        data = os.pread(self._thumbnails, end - start, start) if end > start else b""
        return data if data and len(data) == end - start else None

    def _rows(self, prefix: str, captions: Sequence[str] | None) -> NDArray[np.int64]:
        """Rows that both conditions leave, ascending."""
        left: set[int] | None = None
        if captions is not None:
            left = {row for caption in captions for row in self._by_caption.get(caption, ())}
        if prefix:

            def beginning(key: str) -> str:
                return key[: len(prefix)]

            first = bisect.bisect_left(self._sorted_keys, prefix, key=beginning)
            last = bisect.bisect_right(self._sorted_keys, prefix, key=beginning)
            named = self._sorted_rows[first:last]
            left = set(named) if left is None else left.intersection(named)
        return np.array(sorted(left or ()), dtype=np.int64)

    def _among(
        self, rows: NDArray[np.int64], query_D: NDArray[np.float32], top_k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores = np.empty(len(rows), dtype=np.float32)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            scores[part] = self._vectors_ND[rows[part]] @ query_D
        best = np.argsort(-scores, kind="stable")[:top_k]
        return scores[best], rows[best]
