"""Packed towers compute what they computed, and what is not a plain layer stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    MobileNetV2Config,
    MobileNetV2Model,
)

from fmray.models import packed
from fmray.models.decoding.weights import packs
from fmray.models.packed import FusedConvolution, PackedLinear, pack_for_answers

pytestmark = pytest.mark.skipif(not packs(torch.zeros(2, 2)), reason="this torch has no oneDNN")


def vision() -> CLIPVisionModel:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **size)).eval()


def convolutions(**options: object) -> MobileNetV2Model:
    torch.manual_seed(0)
    model = MobileNetV2Model(MobileNetV2Config(image_size=64, depth_multiplier=0.5, **options)).eval()
    for layer in model.modules():  # statistics that folding must not lose
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.7, 1.3)
            nn.init.uniform_(layer.bias, -0.3, 0.3)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_transformer_says_the_same(rows: int) -> None:
    plain, pixels = vision(), torch.randn(rows, 3, 32, 32)
    answering = copy.deepcopy(plain)
    pack_for_answers(answering)
    assert sum(isinstance(layer, PackedLinear) for layer in answering.modules()) == 12
    torch.testing.assert_close(answering(pixels)[0], plain(pixels)[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("side", [64, 96])
def test_a_mobilenet_says_the_same_at_any_size(rows: int, side: int) -> None:
    plain = convolutions(tf_padding=False).to(memory_format=torch.channels_last)
    pixels = torch.randn(rows, 3, side, side).contiguous(memory_format=torch.channels_last)
    answering = copy.deepcopy(plain)
    pack_for_answers(answering)
    assert sum(isinstance(layer, FusedConvolution) for layer in answering.modules()) > 40
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in answering.modules())
    torch.testing.assert_close(
        answering(pixels).pooler_output, plain(pixels).pooler_output, atol=1e-4, rtol=1e-4
    )


@torch.inference_mode()
def test_a_mobilenet_padded_as_tensorflow_does_keeps_its_layers() -> None:
    plain, pixels = convolutions(tf_padding=True), torch.randn(2, 3, 64, 64)
    answering = copy.deepcopy(plain)
    pack_for_answers(answering)
    assert not any(isinstance(layer, FusedConvolution) for layer in answering.modules())
    torch.testing.assert_close(
        answering(pixels).pooler_output, plain(pixels).pooler_output, atol=1e-4, rtol=1e-4
    )


@torch.inference_mode()
def test_a_text_tower_with_a_mask_says_the_same() -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain = BertModel(BertConfig(vocab_size=50, **size), add_pooling_layer=False).eval()
    answering = copy.deepcopy(plain)
    pack_for_answers(answering)
    ids, mask = torch.randint(0, 50, (3, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    mine, theirs = (model(ids, attention_mask=mask).last_hidden_state for model in (answering, plain))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_layer_of_another_class_stays() -> None:
    class Adapted(nn.Linear):
        """As LoRA's: more than its weight."""

    tower = nn.Sequential(Adapted(4, 4), nn.Linear(4, 4))
    pack_for_answers(tower)
    assert type(tower[0]) is Adapted
    assert isinstance(tower[1], PackedLinear)


def test_where_onednn_is_missing_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "packs", lambda _weight: False)
    tower = vision()
    pack_for_answers(tower)
    assert not any(isinstance(layer, PackedLinear | FusedConvolution) for layer in tower.modules())
