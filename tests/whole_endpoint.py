"""An endpoint that has everything: models of every kind and an index, all tiny and from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fmray.config.serving import ServeConfig
from fmray.pipeline.index import build_index
from tests.endpoint import save_answering, save_tiny_checkpoint
from tests.tiny_mllm import tiny_mllm
from tests.tiny_vqa import tiny_vqa
from tests.unit.serving.index_folders import index_config, write_pictures


def whole_config(folder: Path, **config: Any) -> ServeConfig:
    """`fmray-clip`, `fmray-vqa`, `fmray-mllm` and the index `pictures`, kept in the folder."""
    checkpoint = save_tiny_checkpoint(folder / "clip")
    root, index = write_pictures(folder / "pictures"), folder / "index"
    build_index(index_config(checkpoint, root, index))
    more = {
        "fmray-vqa": save_answering(tiny_vqa(seed=2), folder / "vqa"),
        "fmray-mllm": save_answering(tiny_mllm(seed=3), folder / "mllm"),
    }
    return ServeConfig(checkpoint=checkpoint, more=more, indexes={"pictures": str(index)}, **config)
