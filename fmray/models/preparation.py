"""A picture's preparation: what turns pixels into a tower's input, and the file that tells others of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from fmray.config.schema import ImageConfig

IMAGE_STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and deviation per channel, for pixels in 0..1."""


def image_statistics(image: ImageConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of a preparation."""
    if image.mean is not None and image.std is not None:
        return image.mean, image.std
    return IMAGE_STATISTICS[image.normalize]


def normalized_pixels(pixels_BCHW: Tensor, image: ImageConfig) -> Tensor:
    """uint8 pixels, or float in 0..1, [B, 3, H, W] → (pixel − mean) / deviation per channel, float32."""
    mean, std = (torch.tensor(v, device=pixels_BCHW.device).view(3, 1, 1) for v in image_statistics(image))
    unit = pixels_BCHW.float() / 255 if pixels_BCHW.dtype == torch.uint8 else pixels_BCHW
    return (unit - mean) / std


def save_picture_preparation(image: ImageConfig, folder: Path) -> None:
    """preprocessor_config.json in CLIP's own format, which transformers reads."""
    mean, std = image_statistics(image)
    side = {"height": image.size, "width": image.size}
    preparation = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image.size} if image.fit == "crop" else side,
        "resample": 3,  # PIL's number for bicubic
        "do_center_crop": image.fit == "crop",
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": image.normalize != "none",
        "image_mean": list(mean),
        "image_std": list(std),
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps(preparation, indent=2) + "\n", encoding="utf-8"
    )
