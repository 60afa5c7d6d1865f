"""Both engines, every ZeRO stage and number of ranks: one arithmetic. GradCache: the whole batch's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ResNetConfig

from fmray.config.schema import EngineConfig, OptimizerConfig
from fmray.models.clip import DualEncoder
from fmray.models.freezing import parameter_groups
from fmray.objectives.contrastive import infonce
from fmray.training.engine import Engine, make_engine, rates_at
from fmray.training.grad_cache import GradCache, Outputs, forward_outputs
from fmray.types import ImageTextBatch
from tests.tiny import tiny_batch, tiny_config, tiny_model
from tests.workers import run_workers

ROWS, STEPS = 16, 4
# eps well above the rounding of a gradient: Adam divides by it where a gradient is tiny, and would compare that rounding
OPTIMIZER = OptimizerConfig(lr=3e-3, betas=(0.9, 0.98), eps=1e-4, weight_decay=0.1, gradient_clipping=0.5)


def contrast(outputs: Outputs, batch: ImageTextBatch) -> torch.Tensor:
    return infonce(
        outputs["image_embeds"], outputs["text_embeds"], outputs["logit_scale"], batch.caption_key_B
    )


def convolutional_model() -> DualEncoder:
    """A tower whose weights lie channels-last in memory, its BatchNorm folded, as `clip_emoji` has it."""
    torch.manual_seed(0)
    config = tiny_config()
    config.vision_config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    config.vision_pooling, config.folded_batch_norm = "mean", True
    return DualEncoder(config)


def engine_for(
    stage: int | None, rows: int, dropout: float = 0.0, convolutional: bool = False
) -> tuple[Engine, list[Any]]:
    model = (convolutional_model() if convolutional else tiny_model(dropout=dropout)).train()
    groups = parameter_groups(model, {}, OPTIMIZER.lr, OPTIMIZER.weight_decay)
    config = EngineConfig(kind="torch")
    if stage is not None:
        config = EngineConfig.model_validate({"kind": "deepspeed", "zero_stage": stage})
    return make_engine(model, groups, OPTIMIZER, config, torch.device("cpu"), rows), groups


def train(
    rank: int, world: int, stage: int | None, chunk: int | None, restart: bool = False, **options: Any
) -> dict[str, Any]:
    """Four steps; returns losses, norms and all tensors."""
    rows = ROWS // world
    engine, groups = engine_for(stage, chunk or rows, **options)
    losses, norms = [], []
    for step in range(STEPS):
        batch = tiny_batch(ROWS, seed=step).rows(slice(rank * rows, (rank + 1) * rows))
        if chunk:
            loss, _ = GradCache(engine, contrast, chunk).backward(batch, noise_seed=step)
        else:
            loss = contrast(forward_outputs(engine, batch), batch)
            engine.backward(loss)
        norms.append(engine.step(rates_at(groups, OPTIMIZER, step, STEPS)))
        losses.append(float(loss.detach()))
        if restart and step == 1:
            saved = dict(engine.tensors())
            engine, groups = engine_for(stage, chunk or rows)
            for name, tensors in saved.items():
                engine.load_tensors(name, {k: v.clone() for k, v in tensors.items()})
            engine.load_step(step + 1)
    return {"losses": losses, "norms": norms, "tensors": dict(engine.tensors())}


def every_case(rank: int, world: int, stages: list[int | None]) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for stage in stages:
        cases[f"{stage}"] = train(rank, world, stage, None)
        cases[f"{stage}/chunk"] = train(rank, world, stage, 4)
        cases[f"{stage}/restart"] = train(rank, world, stage, None, restart=True)
        cases[f"{stage}/dropout"] = train(rank, world, stage, 4, dropout=0.1)
        cases[f"{stage}/convolutional"] = train(rank, world, stage, None, convolutional=True)
    return cases


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None}


def test_grad_cache_gives_the_gradient_of_the_whole_batch_under_the_same_noise() -> None:
    """Dropout 0.1: the reference keeps every chunk's graph, drawn with the seeds that GradCache counts out."""
    torch.set_num_threads(1)
    batch, chunks = tiny_batch(ROWS), [slice(start, start + 4) for start in range(0, ROWS, 4)]
    engine, _ = engine_for(None, ROWS, dropout=0.1)
    parts = []
    for index, rows in enumerate(chunks):
        torch.manual_seed(70 + index)
        parts.append(forward_outputs(engine, batch.rows(rows)))
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("image_embeds", "text_embeds")}
    expected_loss = contrast(whole | {"logit_scale": parts[0]["logit_scale"]}, batch)
    expected_loss.backward()
    expected = gradients(engine)
    other, _ = engine_for(None, 4, dropout=0.1)
    loss, _ = GradCache(other, contrast, 4).backward(batch, noise_seed=70)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-7)
    found = gradients(other)
    assert found.keys() == expected.keys()
    assert "temperature.log_scale" in found
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) <= 1e-6


def assert_close(mine: dict[str, Any], reference: dict[str, Any], tolerance: float) -> None:
    assert mine["tensors"].keys() == reference["tensors"].keys()
    assert mine["norms"] == pytest.approx(reference["norms"], rel=10 * tolerance)
    for name, tensors in reference["tensors"].items():
        for key, expected in tensors.items():
            difference = (mine["tensors"][name][key] - expected).abs().max()
            assert difference <= tolerance, f"{name} {key}: {difference:.1e}"


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    torch.set_num_threads(1)
    return train(0, 1, None, None)


def test_torch_engine_grad_cache_and_restart_on_one_rank(reference: dict[str, Any]) -> None:
    assert_close(train(0, 1, None, 4), reference, 1e-6)
    restarted = train(0, 1, None, None, restart=True)
    assert restarted["losses"] == reference["losses"]
    assert_close(restarted, reference, 0.0)


@pytest.mark.slow
@pytest.mark.deepspeed
def test_every_engine_and_stage_is_one_arithmetic_on_two_ranks(reference: dict[str, Any]) -> None:
    ranks = run_workers(2, every_case, [None, 0, 1, 2, 3])
    for case, mine in ranks[0].items():
        kind = case.partition("/")[2]
        if kind in ("dropout", "convolutional"):  # the same noise, the same other model, under every engine
            assert_close(mine, ranks[0][f"None/{kind}"], 2e-6)
            continue
        mean_losses = [(a + b) / 2 for a, b in zip(mine["losses"], ranks[1][case]["losses"], strict=True)]
        assert mean_losses == pytest.approx(reference["losses"], rel=1e-5), case
        assert_close(mine, reference, 2e-6)
    for stage in (None, 0, 1, 2, 3):
        assert_close(ranks[0][f"{stage}/restart"], ranks[0][f"{stage}"], 0.0)
