"""transformers' LLaVA as the peer: the same logits and loss in either class, there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from fmray.errors import CheckpointError
from fmray.models.mllm import Mllm
from fmray.models.mllm_llava import from_llava, to_llava
from fmray.models.preparation import normalized_pixels
from tests.tiny_mllm import tiny_mllm

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
PICTURE = 5


def llava(vision: type[PreTrainedConfig] = CLIPVisionConfig, **changes: Any) -> LlavaForConditionalGeneration:
    """Random, with weights large enough that logits are not all alike."""
    torch.manual_seed(0)
    tie = changes.pop("tie", True)
    keys: dict[str, Any] = {
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        **changes,
    }
    text = LlamaConfig(
        vocab_size=80,
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision(image_size=16, patch_size=8, **SHAPE),
            text_config=text,
            image_token_id=PICTURE,
            image_seq_length=4,
            tie_word_embeddings=tie,
            **keys,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, the second left-padded; and a picture for each."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 80, (2, 11), generator=draw)
    ids[0, 2:6] = ids[1, 5:9] = PICTURE
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=draw, dtype=torch.uint8)
    return ids, mask, pixels


def of_llava(whole: LlavaForConditionalGeneration, like: Mllm, picture: int = PICTURE) -> Tensor:
    ids, mask, pixels = inputs()
    ids = torch.where(ids == PICTURE, picture, ids)
    normal = normalized_pixels(pixels, like.image)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = whole(
        input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=normal
    ).logits
    return logits[mask.bool()]


def of_ours(model: Mllm, picture: int = PICTURE) -> Tensor:
    ids, mask, pixels = inputs()
    ids = torch.where(ids == PICTURE, picture, ids)
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    assert logits is not None
    return logits[mask.bool()]


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("layer", [-2, -1, 2])
def test_llava_there_and_back(tie: bool, layer: int) -> None:
    whole = llava(tie=tie, vision_feature_layer=layer)
    ours = from_llava(whole)
    assert ours.config.grid == [2, 2]
    torch.testing.assert_close(of_ours(ours), of_llava(whole, ours), atol=1e-5, rtol=0)
    back = to_llava(ours)
    torch.testing.assert_close(of_llava(back, ours), of_ours(ours), atol=1e-5, rtol=0)
    assert (back.lm_head.weight is back.get_input_embeddings().weight) == tie
    assert not any(
        mine.data_ptr() == theirs.data_ptr()
        for mine, theirs in zip(ours.parameters(), whole.parameters(), strict=False)
    )


@torch.no_grad()
def test_a_tower_without_class_token_gives_all_its_patches() -> None:
    whole = llava(SiglipVisionConfig, vision_feature_select_strategy="full")
    ours = from_llava(whole)
    torch.testing.assert_close(of_ours(ours), of_llava(whole, ours), atol=1e-5, rtol=0)
    assert to_llava(ours).config.vision_feature_select_strategy == "full"


def test_loss_and_gradients_are_llavas() -> None:
    whole = llava(tie=False)
    ours = from_llava(whole)
    ids, mask, pixels = inputs()
    labels = ids.masked_fill((ids == PICTURE) | (mask == 0), -100)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = whole(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        pixel_values=normalized_pixels(pixels, ours.image),
        labels=labels,
    ).loss
    mine = ours(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    theirs.backward()
    mine.backward()
    torch.testing.assert_close(
        ours.projector[0].weight.grad, whole.model.multi_modal_projector.linear_1.weight.grad
    )


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
def test_a_placeholder_behind_the_vocabulary(tie: bool) -> None:
    """Ours is never looked up; LLaVA looks its own up, so the vocabulary grows by a word that is never said."""
    ours = from_llava(llava(tie=tie))
    ours.config.image_token_id = 80
    whole = to_llava(ours)
    logits = of_llava(whole, ours, picture=80)
    assert logits.shape[1] == 81
    torch.testing.assert_close(logits[:, :80], of_ours(ours, picture=80), atol=1e-5, rtol=0)
    assert whole.generation_config.suppress_tokens == [80]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"vision_feature_layer": [-2, -1]},
            "reads layers [-2, -1] of clip_vision_model with strategy default; here it is one layer, its class token left out "
            "where there is one",
        ),
        (
            {"vision_feature_select_strategy": "full"},
            "reads layers -2 of clip_vision_model with strategy full; here it is one layer, its class token left out where "
            "there is one",
        ),
        (
            {"projector_hidden_act": "relu"},
            "its projector has relu; here it is GELU between two matrices with biases",
        ),
        (
            {
                "vision": SiglipVisionConfig,
                "vision_feature_select_strategy": "full",
                "vision_feature_layer": -1,
            },
            "reads siglip_vision_model's last layer before its norm, here it is read behind; take -2",
        ),
    ],
)
def test_other_llavas_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_llava(llava(**changes))
    assert str(caught.value) == f"LLaVA: {said}"


@pytest.mark.parametrize(
    "changes", [{"language": "gpt2"}, {"fusion": "cross_attention"}, {"projector": "linear"}]
)
def test_models_that_llava_is_not(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^LLaVA has no model of .*; keep fmray's own folder$"):
        to_llava(tiny_mllm(**changes).model)
