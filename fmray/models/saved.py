"""Dual encoders on disk: our folders, and CLIP and SigLIP checkpoints of the hub, in and out."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from fmray.config.schema import ImageConfig
from fmray.errors import CheckpointError
from fmray.manifest import find_model_folder
from fmray.models.clip import DualEncoder, DualEncoderConfig
from fmray.models.loading import check_complete
from fmray.models.preparation import save_picture_preparation


@dataclass(frozen=True, slots=True)
class LoadedDualEncoder:
    """A model ready to embed, with what prepares its inputs."""

    model: DualEncoder
    tokenizer: PreTrainedTokenizerFast
    image: ImageConfig
    max_tokens: int


def save_dual_encoder(model: DualEncoder, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """config.json, model.safetensors, the tokenizer and a preprocessor_config.json that transformers reads."""
    # not `save_pretrained`: it imports accelerate and with it deepspeed, seconds for every process that saves
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_preparation(model, tokenizer, folder)


def save_preparation(model: DualEncoder, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """What stands beside the weights: tokenizer files and the picture's preparation in CLIP's own format."""
    tokenizer.save_pretrained(folder)
    save_picture_preparation(model.image, folder)


def load_dual_encoder(location: str, device: torch.device) -> LoadedDualEncoder:
    """A model folder, a checkpoint folder or a run folder, local or URL; only safetensors are read.

    Raises CheckpointError in one line where there is none or it is another model's.
    """
    folder = find_model_folder(location)
    if "://" in folder:
        with tempfile.TemporaryDirectory() as local:
            filesystem, path = fsspec.core.url_to_fs(folder)
            filesystem.get(f"{path.rstrip('/')}/", f"{local}/", recursive=True)
            return _load_local(local, location, device)
    return _load_local(folder, location, device)


def _load_local(folder: str, location: str, device: torch.device) -> LoadedDualEncoder:
    kind = json.loads(Path(folder, "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind in ("clip", "siglip"):
        model, tokenizer = load_any_clip(folder)
    elif kind != DualEncoderConfig.model_type:
        raise CheckpointError(f"{location}: holds a {kind} model, not a dual encoder (CLIP)")
    else:
        try:
            model, info = DualEncoder.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{location}: cannot be loaded: {str(error).splitlines()[0]}") from None
        check_complete(info, location)
    return LoadedDualEncoder(model.to(device).eval(), tokenizer, model.image, model.config.max_tokens)


# -------------------------------------------------------------------------------------------- CLIP and SigLIP of the hub


def load_any_clip(location: str) -> tuple[DualEncoder, PreTrainedTokenizerFast]:
    """Our own saved model, or transformers' CLIP or SigLIP, as a dual encoder and its tokenizer."""
    if not (Path(location).exists() or "://" in location) or _is_model_of_transformers(location):
        return _load_from_transformers(location)
    loaded = load_dual_encoder(location, torch.device("cpu"))
    return loaded.model, loaded.tokenizer


def _is_model_of_transformers(location: str) -> bool:
    config = Path(location, "config.json")
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") in (
        "clip",
        "siglip",
    )


def _load_from_transformers(location: str) -> tuple[DualEncoder, PreTrainedTokenizerFast]:
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        if not isinstance(config, CLIPConfig | SiglipConfig):
            raise CheckpointError(f"{location}: is a {config.model_type} model, not CLIP or SigLIP")
        kind = CLIPModel if isinstance(config, CLIPConfig) else SiglipModel
        whole, info = kind.from_pretrained(
            location, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{location}: cannot be loaded: {str(error).splitlines()[0]}") from None
    check_complete(info, location)
    return from_transformers(whole, _image_of(location, config)), tokenizer


def _image_of(location: str, config: CLIPConfig | SiglipConfig) -> ImageConfig:
    """The picture's preparation from preprocessor_config.json, else the architecture's usual one."""
    size = config.vision_config.image_size
    saved = Path(location, "preprocessor_config.json")
    if not saved.is_file():
        clip = isinstance(config, CLIPConfig)
        return ImageConfig(size=size, fit="crop" if clip else "stretch", normalize="clip" if clip else "half")
    keys = json.loads(saved.read_text(encoding="utf-8"))
    fit = "crop" if keys.get("do_center_crop", "shortest_edge" in keys.get("size", {})) else "stretch"
    if not keys.get("do_normalize", True):
        return ImageConfig(size=size, fit=fit, normalize="none")
    return ImageConfig(
        size=size, fit=fit, normalize="custom", mean=tuple(keys["image_mean"]), std=tuple(keys["image_std"])
    )


def from_transformers(whole: CLIPModel | SiglipModel, image: ImageConfig) -> DualEncoder:
    """The same function as a CLIPModel or SiglipModel, its towers reused without a copy."""
    clip = isinstance(whole, CLIPModel)
    config = DualEncoderConfig(
        vision_config=whole.config.vision_config.to_dict(),  # copies: models write into their configurations
        text_config=whole.config.text_config.to_dict(),
        image=image.model_dump(mode="json"),
        embed_dim=whole.config.projection_dim if clip else whole.config.vision_config.hidden_size,
        vision_pooling="pooler",
        text_pooling="pooler",
        vision_projection="linear" if clip else "identity",
        text_projection="linear" if clip else "identity",
        objective="infonce" if clip else "siglip",
        max_tokens=whole.config.text_config.max_position_embeddings,
        pad_to_max=not clip,
    )
    model = DualEncoder(config, whole.vision_model, whole.text_model)
    with torch.no_grad():
        model.temperature.log_scale.copy_(whole.logit_scale.reshape(1))
        if clip:
            model.vision_projection.load_state_dict(whole.visual_projection.state_dict())
            model.text_projection.load_state_dict(whole.text_projection.state_dict())
        else:
            assert model.temperature.bias is not None
            model.temperature.bias.copy_(whole.logit_bias.reshape(1))
    return model


def to_transformers(model: DualEncoder) -> CLIPModel | SiglipModel:
    """Back to transformers' own class, for people who load it without fmray; CLIP and SigLIP towers only."""
    vision, text = model.config.vision_config.to_dict(), model.config.text_config.to_dict()
    towers = (vision["model_type"], text["model_type"])
    if towers == ("clip_vision_model", "clip_text_model"):
        whole = CLIPModel(
            CLIPConfig(vision_config=vision, text_config=text, projection_dim=model.config.embed_dim)
        )
        whole.visual_projection.load_state_dict(model.vision_projection.state_dict())
        whole.text_projection.load_state_dict(model.text_projection.state_dict())
    elif towers == ("siglip_vision_model", "siglip_text_model"):
        whole = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        assert model.temperature.bias is not None
        whole.logit_bias.data.fill_(model.temperature.bias.item())
    else:
        raise CheckpointError(
            f"transformers has no class for {' and '.join(towers)} together; keep fmray's own folder"
        )
    whole.vision_model.load_state_dict(model.vision.state_dict())
    whole.text_model.load_state_dict(model.text.state_dict())
    whole.logit_scale.data.fill_(model.temperature.log_scale.item())
    return whole.eval()
