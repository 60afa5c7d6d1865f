"""Folders of pictures, indexes built of them by the real door, and indexes written by hand with whatever is wrong with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fmray.config.index import IndexConfig
from fmray.config.loading import validate
from tests.endpoint import picture

COLORS = ("black", "blue", "green", "orange", "purple", "red")
MADE_BY = "c" * 64


def write_pictures(root: Path, each: int = 2) -> Path:
    """`<root>/<color>/<n>.png`, each of another size."""
    for color in COLORS:
        for number in range(each):
            file = root / color / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(color, (20 + 6 * number, 24)))
    return root


def index_config(checkpoint: str, root: Path, output: Path, **changes: Any) -> IndexConfig:
    keys: dict[str, Any] = {
        "checkpoint": checkpoint,
        "source": {"path": str(root)},
        "output": str(output),
        "batch_size": 4,
        "progress": False,
    }
    return validate(IndexConfig, keys | changes)


def unit_rows(count: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_index(
    folder: Path,
    vectors_ND: NDArray[np.float32],
    keys: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    thumbnails: Sequence[bytes] | None = None,
    *,
    links: int = 0,
    **facts: Any,
) -> Path:
    """An index as its documented layout says, written without fmray; `facts` go into the manifest as they are."""
    count, dim = vectors_ND.shape
    keys = [f"picture-{row}.png" for row in range(count)] if keys is None else keys
    captions = [[] for _ in keys] if captions is None else captions
    thumbnails = [b""] * len(keys) if thumbnails is None else thumbnails
    version = f"v-{hashlib.sha256(vectors_ND.tobytes() + repr(keys).encode()).hexdigest()[:16]}"
    place = folder / version
    place.mkdir(parents=True, exist_ok=True)
    index = faiss.IndexFlatIP(dim)
    if links:
        index = faiss.IndexHNSWFlat(dim, links, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors_ND)
    faiss.write_index(index, str(place / "index.faiss"))
    types = [("key", pa.string()), ("captions", pa.list_(pa.string())), ("thumbnail_bytes", pa.int32())]
    columns = [list(keys), [list(texts) for texts in captions], [len(one) for one in thumbnails]]
    pq.write_table(pa.table(columns, schema=pa.schema(types)), place / "pictures.parquet")
    (place / "thumbnails.bin").write_bytes(b"".join(thumbnails))
    names = ("index.faiss", "pictures.parquet", "thumbnails.bin")
    manifest = {
        "format": 1,
        "version": version,
        "checkpoint": MADE_BY,
        "kind": "hnsw" if links else "flat",
        "dim": dim,
        "count": count,
        "links": links,
        "search": 64 if links else 0,
        "thumbnail": 96,
        "built_at": 1_700_000_000,
        "files": {name: summed(place / name) for name in names},
    }
    put_manifest(folder, manifest | facts)
    return folder


def summed(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def manifest_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def put_manifest(folder: Path, manifest: object) -> None:
    beside = folder / "manifest.tmp"
    beside.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    beside.replace(folder / "manifest.json")


def changed(folder: Path, name: str, change: Callable[[bytes], bytes], *, summed_again: bool) -> None:
    """Change a file of an index; with `summed_again` its manifest agrees, as whoever can write there would have it."""
    manifest = manifest_of(folder)
    path = folder / manifest["version"] / name
    path.write_bytes(change(path.read_bytes()))
    if summed_again:
        manifest["files"][name] = summed(path)
        put_manifest(folder, manifest)
