"""What `/v1/search` finds among the held-out emoji is what the evaluation says the model finds."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import torch

from fmray.config.data import EmojiSource
from fmray.config.schema import EvaluateConfig
from fmray.config.serving import ServeConfig
from fmray.data.loader import caption_key
from fmray.data.sources import open_source
from fmray.evaluation.embed import embed_pairs, measuring
from fmray.evaluation.retrieval import evaluate_retrieval
from fmray.models.saved import load_dual_encoder
from fmray.pipeline.index import build_index
from fmray.serving.opening import Endpoint
from tests.endpoint import serving
from tests.unit.evaluation.contexts import context
from tests.unit.serving.index_folders import index_config

ROOT = Path(__file__).parents[3]
CLOSE = 1e-5
"""Scores that float32 may put in either order."""

pytestmark = [pytest.mark.assets, pytest.mark.slow]


def trained() -> str:
    """A dual encoder that a run here has trained; skips where there is none."""
    for config in sorted(ROOT.glob("runs/*/checkpoints/*/model/config.json"), reverse=True):
        if json.loads(config.read_text()).get("model_type") == "fmray_dual_encoder":
            return str(config.parent)
    pytest.skip("no run here has trained a dual encoder")


@pytest.mark.parametrize("which", ["untrained", "trained"])
def test_recall_at_5_of_the_search_is_the_evaluations(checkpoint: str, tmp_path: Path, which: str) -> None:
    location = trained() if which == "trained" else checkpoint
    build_index(
        index_config(
            location, tmp_path, tmp_path / "index", source={"kind": "emoji"}, split="test", batch_size=64
        )
    )
    source, here = open_source(EmojiSource(), "test"), context()
    loaded = load_dual_encoder(location, torch.device("cpu"))
    with measuring(loaded.model):
        pairs = embed_pairs(loaded, source, EvaluateConfig(batch_size=64, templates=("{}",)), 0.0, here)
    measured = evaluate_retrieval(pairs, here)["eval/text_to_image/r5"]
    distinct, image_key_N, text_key_P = pairs.distinct()
    names = [source.name(int(row)) for row in distinct.sample_N]
    texts = {caption_key(text): text for row in distinct.sample_N for text in source[int(row)].captions}

    endpoint = Endpoint(ServeConfig(checkpoint=location, indexes={"emoji": str(tmp_path / "index")}))
    found, close = 0, 0
    with serving(endpoint.app) as url, httpx.Client(base_url=url, timeout=60) as client:
        for row, key in enumerate(text_key_P.tolist()):
            query = texts[int(distinct.caption_P[row])]
            hits = client.post("/v1/search", json={"query": query, "top_k": 6}).json()["data"]
            wanted = {names[i] for i in (image_key_N == key).nonzero()[:, 0].tolist()}
            found += any(hit["id"] in wanted for hit in hits[:5])
            close += hits[4]["score"] - hits[5]["score"] < CLOSE
    count = len(text_key_P)
    assert count > 200
    assert abs(found - measured * count) <= close
    if which == "trained":
        assert close <= count // 20
        assert found > 0.1 * count
