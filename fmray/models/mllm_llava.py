"""Between transformers' LLaVA and our multimodal LLM: the same function in either class, weights copied."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from fmray.config.schema import ImageConfig
from fmray.errors import CheckpointError
from fmray.models.mllm import Mllm, MllmConfig
from fmray.models.mllm_parts import token_grid

PARTS = {
    "model.vision_tower.": "vision.",
    "model.multi_modal_projector.linear_1.": "projector.0.",
    "model.multi_modal_projector.linear_2.": "projector.2.",
    "model.language_model.": "language.model.",
    "lm_head.": "language.lm_head.",
}
"""What LLaVA's parts are called here; its Llama-like language models keep their body under `model`."""


def from_llava(
    whole: LlavaForConditionalGeneration, image: ImageConfig | None = None, *, max_tokens: int = 2048
) -> Mllm:
    """The same function as a LLaVA (1.5's shape: patches of one layer without the class token, two matrices with GELU).

    image: its preparation; None: CLIP's at the tower's size. Raises CheckpointError where it is of another shape.
    """
    keys, vision = whole.config, whole.config.vision_config
    tower, layer, strategy = (
        whole.model.vision_tower,
        keys.vision_feature_layer,
        keys.vision_feature_select_strategy,
    )
    if not isinstance(layer, int) or strategy != _strategy(tower):
        shape = f"layers {layer} of {vision.model_type} with strategy {strategy}"
        raise CheckpointError(
            f"LLaVA: reads {shape}; here it is one layer, its class token left out where there is one"
        )
    if keys.projector_hidden_act != "gelu" or not keys.multimodal_projector_bias:
        cure = "here it is GELU between two matrices with biases"
        raise CheckpointError(f"LLaVA: its projector has {keys.projector_hidden_act}; {cure}")
    layer = layer if layer < 0 else layer - vision.num_hidden_layers - 1
    _check_layer(tower, layer)
    image = image or ImageConfig(size=vision.image_size, normalize="clip")
    config = MllmConfig(
        vision_config=vision,
        text_config=keys.text_config,
        image=image.model_dump(mode="json"),
        vision_layer=layer,
        grid=token_grid(tower, vision, image.size, layer),
        projector="mlp",
        image_token_id=keys.image_token_id,
        max_tokens=max_tokens,
    )
    model = Mllm(config)
    _copy(whole.state_dict(), model, PARTS)
    model.eval()
    return model


def to_llava(model: Mllm) -> LlavaForConditionalGeneration:
    """Back to transformers' own class, for people who load it without fmray.

    A placeholder behind the vocabulary stays there: LLaVA needs an id that it can look up, so the embeddings grow by rows of
    zeros up to it. Raises CheckpointError where LLaVA has no such model.
    """
    config = model.config
    inside = "model" in dict(model.language.named_children()) and hasattr(model.language, "lm_head")
    if config.fusion != "concat" or config.projector != "mlp" or not inside:
        shape = f"{config.fusion}, {config.projector}, {config.vision_config.model_type}, {config.text_config.model_type}"
        raise CheckpointError(f"LLaVA has no model of {shape}; keep fmray's own folder")
    _check_layer(model.vision, config.vision_layer)
    whole = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=copy.deepcopy(config.vision_config),
            text_config=copy.deepcopy(config.text_config),
            image_token_id=config.image_token_id,
            image_seq_length=config.picture_tokens,
            vision_feature_layer=config.vision_layer,
            vision_feature_select_strategy=_strategy(model.vision),
            tie_word_embeddings=config.text_config.tie_word_embeddings,
        )
    )
    back = {ours: theirs for theirs, ours in PARTS.items()}
    _copy(model.state_dict(), whole, back)
    if config.image_token_id >= config.text_config.vocab_size:
        _grow(whole, config.image_token_id + 1)
    return whole.eval()


def _strategy(tower: PreTrainedModel) -> str:
    """What LLaVA calls reading patches alone: it drops the first token, or where there is no class token keeps all."""
    names = {name.split(".")[-1] for name, _ in tower.named_parameters()}
    return "default" if names & {"class_embedding", "cls_token"} else "full"


def _check_layer(tower: PreTrainedModel, layer: int) -> None:
    if layer == -1 and tower.config.model_type != "clip_vision_model":
        kind = tower.config.model_type
        raise CheckpointError(
            f"LLaVA: reads {kind}'s last layer before its norm, here it is read behind; take -2"
        )


def _copy(weights: dict[str, Tensor], into: PreTrainedModel, names: dict[str, str]) -> None:
    renamed = {}
    for name, value in weights.items():
        old = next(prefix for prefix in names if name.startswith(prefix))
        renamed[names[old] + name.removeprefix(old)] = value
    into.load_state_dict(renamed)


@torch.no_grad()
def _grow(whole: LlavaForConditionalGeneration, size: int) -> None:
    """A larger vocabulary; the new words are zeros and never said."""
    old = whole.get_input_embeddings().weight.shape[0]
    whole.resize_token_embeddings(size, mean_resizing=False)
    whole.get_input_embeddings().weight[old:].zero_()
    whole.get_output_embeddings().weight[old:].zero_()
    whole.generation_config.suppress_tokens = list(range(old, size))
