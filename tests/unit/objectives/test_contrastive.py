"""The losses against closed forms, against transformers, and on several ranks against one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fmray.objectives.contrastive import infonce, row_keys, siglip
from tests.workers import run_workers

SCALE, BIAS = torch.tensor(5.0), torch.tensor(-3.0)


def unit_rows(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(
        torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )


def test_infonce_is_cross_entropy_both_ways() -> None:
    image, text = unit_rows(7, 0), unit_rows(7, 1)
    logits = SCALE * image @ text.T
    target = torch.arange(7)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert torch.isclose(infonce(image, text, SCALE, target), expected, atol=1e-12)


def test_infonce_of_indistinguishable_rows_is_log_batch() -> None:
    same = unit_rows(1, 0).expand(9, 6)
    assert infonce(same, same, SCALE, torch.arange(9)).item() == pytest.approx(math.log(9))


def test_rows_with_the_same_caption_share_the_target() -> None:
    """Two rows of one caption, hand calculation: −½ (log p(0) + log p(1)) for each of them."""
    image, text = unit_rows(3, 2), unit_rows(3, 3)
    text[1] = text[0]
    keys = torch.tensor([4, 4, 9])
    log_p, log_q = (SCALE * image @ text.T).log_softmax(1), (SCALE * text @ image.T).log_softmax(1)
    rows = [(m[0, :2].mean() + m[1, :2].mean() + m[2, 2]) / 3 for m in (log_p, log_q)]
    assert torch.isclose(infonce(image, text, SCALE, keys), -(rows[0] + rows[1]) / 2, atol=1e-12)


def test_label_smoothing_matches_torch() -> None:
    image, text = unit_rows(5, 4), unit_rows(5, 5)
    logits, target = SCALE * image @ text.T, torch.arange(5)
    expected = sum(F.cross_entropy(m, target, label_smoothing=0.1) for m in (logits, logits.T)) / 2
    assert torch.isclose(
        infonce(image, text, SCALE, target, label_smoothing=0.1), torch.as_tensor(expected), atol=1e-12
    )


def test_siglip_closed_form() -> None:
    image, text = unit_rows(4, 6), unit_rows(4, 7)
    total = 0.0
    for i in range(4):
        for j in range(4):
            sign = 1.0 if i == j else -1.0
            logit = float(SCALE * image[i] @ text[j] + BIAS)
            total += math.log1p(math.exp(-sign * logit))
    assert siglip(image, text, SCALE, BIAS, torch.arange(4)).item() == pytest.approx(total / 4)


def test_against_transformers_clip_and_siglip() -> None:
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    text = {**tower, "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    inputs = {"input_ids": torch.randint(3, 40, (5, 8)), "pixel_values": torch.randn(5, 3, 16, 16)}
    clip = CLIPModel(
        CLIPConfig(vision_config=vision, text_config={**text, "pad_token_id": 0}, projection_dim=8)
    ).eval()
    out = clip(**inputs, return_loss=True)
    keys = torch.arange(5)
    mine = infonce(out.image_embeds, out.text_embeds, clip.logit_scale.exp(), keys)
    assert abs(mine.item() - out.loss.item()) < 1e-6
    sig = SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, "pad_token_id": 0})).eval()
    sig.logit_scale.data.fill_(1.5)
    sig.logit_bias.data.fill_(-2.0)
    out = sig(**inputs, return_loss=True)
    mine = siglip(out.image_embeds, out.text_embeds, sig.logit_scale.exp(), sig.logit_bias, keys)
    assert abs(mine.item() - out.loss.item()) < 1e-6


def gradients_of(
    kind: str, keys: torch.Tensor, image: torch.Tensor, text: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [
        image.clone().requires_grad_(),
        text.clone().requires_grad_(),
        torch.tensor(1.2, dtype=torch.float64),
    ]
    leaves[2].requires_grad_()
    a, b, s = leaves
    loss = infonce(a, b, s.exp(), keys) if kind == "infonce" else siglip(a, b, s.exp(), BIAS.double(), keys)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def on_a_rank(rank: int, world: int) -> dict[str, Any]:
    image, text = unit_rows(12, 8), unit_rows(12, 9)
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
    shared = torch.tensor([0, 1, 2, 0, 4, 5, 6, 1, 8, 9, 0, 11])
    return {
        f"{kind}/{name}": gradients_of(kind, keys, image[mine], text[mine])
        for kind in ("infonce", "siglip")
        for name, keys in (("pair", row_keys(12 // world, torch.device("cpu"))), ("caption", shared[mine]))
    }


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_on_ranks_are_those_of_one_process_with_the_whole_batch(world: int) -> None:
    whole, ranks = on_a_rank(0, 1), run_workers(world, on_a_rank)
    for case, (loss, image, text, scale) in whole.items():
        mine = [rank[case] for rank in ranks]
        # engines average gradients over ranks: rows' gradients come out 1/world of the whole batch's, summed they are equal
        assert torch.isclose(torch.stack([m[0] for m in mine]).mean(), loss, atol=1e-9), case
        assert torch.allclose(torch.cat([m[1] for m in mine]) / world, image, atol=1e-9), case
        assert torch.allclose(torch.cat([m[2] for m in mine]) / world, text, atol=1e-9), case
        assert torch.isclose(torch.stack([m[3] for m in mine]).mean(), scale, atol=1e-9), case
