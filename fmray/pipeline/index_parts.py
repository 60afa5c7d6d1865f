"""One part of an index on its way: read and decoded, then embedded; Arrow streams in between, in one process or many.

B pictures of a part  S side of the model's input  D width of the shared space
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from fmray.config.base import RuntimeConfig
from fmray.config.schema import ImageConfig
from fmray.data.transforms import compose, decode_rgba, white
from fmray.errors import DataError
from fmray.evaluation.embed import embed_pictures, measuring
from fmray.models.saved import load_dual_encoder
from fmray.pipeline.index_pictures import KeyedPictures
from fmray.runtime.context import choose_device, prepare_process
from fmray.serving.index_store import LONGEST_CAPTION, MOST_CAPTIONS, why_not_a_key

JPEG_QUALITY = 80
LEFT_OUT = b"left_out"
COLUMNS = [("key", pa.string()), ("captions", pa.list_(pa.string())), ("thumbnail", pa.binary())]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a part is read from, and how: sent once to every process that decodes."""

    pictures: KeyedPictures
    image: ImageConfig
    batch_size: int
    thumbnail: int
    """Side in pixels; 0: none."""
    max_pixels: int

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-len(self.pictures) // self.batch_size)


@dataclass(frozen=True, slots=True)
class EmbeddedPart:
    """Pictures in the order of their source, those that could not be read left out."""

    keys: list[str]
    captions: list[list[str]]
    thumbnails: list[bytes]
    vectors_BD: NDArray[np.float32]
    left_out: list[tuple[str, str]]
    """Key and reason."""


def read_part(reading: Reading, part: int) -> bytes:
    """A part's pictures decoded: an Arrow stream with a row for each that can be used, pixels uint8 [4, S, S] on end."""
    rows: list[dict[str, Any]] = []
    left_out: list[tuple[str, str]] = []
    start = part * reading.batch_size
    for row in range(start, min(start + reading.batch_size, len(reading.pictures))):
        key = reading.pictures.key(row)
        try:
            if (fault := why_not_a_key(key)) is not None:
                raise DataError(f"{key!a:.200}: {fault}")
            rows.append(_read_row(reading, row, key))
        except DataError as error:
            left_out.append((key.encode("ascii", "backslashreplace").decode(), str(error)))
    schema = pa.schema([*COLUMNS, ("pixels", pa.large_binary())], {LEFT_OUT: json.dumps(left_out).encode()})
    return _stream(pa.Table.from_pylist(rows, schema))


def _read_row(reading: Reading, row: int, key: str) -> dict[str, Any]:
    encoded, captions = reading.pictures.read(row)
    rgba_4SS = decode_rgba(encoded, reading.image, name=key, max_pixels=reading.max_pixels)
    return {
        "key": key,
        "captions": [caption[:LONGEST_CAPTION] for caption in captions[:MOST_CAPTIONS]],
        "thumbnail": _thumbnail(encoded, key, reading) if reading.thumbnail else b"",
        "pixels": rgba_4SS.numpy().tobytes(),
    }


def _thumbnail(encoded: bytes, key: str, reading: Reading) -> bytes:
    """The whole picture on a white square, as JPEG."""
    small = ImageConfig(size=reading.thumbnail, fit="pad")
    rgba_14TT = decode_rgba(encoded, small, name=key, max_pixels=reading.max_pixels)[None]
    rgb_TT3 = compose(rgba_14TT, white(1))[0].permute(1, 2, 0).contiguous().numpy()
    out = io.BytesIO()
    Image.fromarray(rgb_TT3).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


class PictureTower:
    """The model, asked for one part after the other: `PictureTower("runs/clip", RuntimeConfig())(read_part(reading, 0))`."""

    def __init__(self, checkpoint: str, runtime: RuntimeConfig) -> None:
        """Raises CheckpointError."""
        prepare_process(runtime)
        self._encoder = load_dual_encoder(checkpoint, choose_device(runtime.device))
        self.image = self._encoder.image
        self.dim: int = self._encoder.model.config.embed_dim

    def __call__(self, read: bytes) -> bytes:
        """A part as `read_part` gives it to one with vectors in place of pixels; raises DataError where one is not finite."""
        table = _table(read)
        side = self.image.size
        vectors_BD = np.empty((0, self.dim), dtype=np.float32)
        if table.num_rows:
            joined = bytearray().join(table["pixels"].to_pylist())
            rgba_B4SS = torch.frombuffer(joined, dtype=torch.uint8).view(-1, 4, side, side)
            with measuring(self._encoder.model):
                vectors_BD = embed_pictures(self._encoder, rgba_B4SS).float().cpu().numpy()
        if not np.isfinite(vectors_BD).all():
            raise DataError("the model's vectors are not finite: its weights are damaged")
        flat = pa.array(vectors_BD.reshape(-1), pa.float32())
        vectors = pa.FixedSizeListArray.from_arrays(flat, vectors_BD.shape[1])
        return _stream(table.drop_columns("pixels").append_column("vector", vectors))


def embedded_part(stream: bytes) -> EmbeddedPart:
    """What `PictureTower` made, taken apart; raises DataError where it is no such thing (a file cut off)."""
    try:
        table = _table(stream)
        left_out = [(str(key), str(reason)) for key, reason in json.loads(table.schema.metadata[LEFT_OUT])]
        vectors = table["vector"].combine_chunks()
        width = vectors.type.list_size
        return EmbeddedPart(
            table["key"].to_pylist(),
            table["captions"].to_pylist(),
            table["thumbnail"].to_pylist(),
            vectors.flatten()
            .to_numpy(zero_copy_only=False)
            .reshape(-1, width)
            .astype(np.float32, copy=False),
            left_out,
        )
    except (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError, OSError):
        raise DataError("not a part of an index") from None


def _stream(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _table(stream: bytes) -> Any:
    with pa.ipc.open_stream(pa.BufferReader(stream)) as reader:
        return reader.read_all()
