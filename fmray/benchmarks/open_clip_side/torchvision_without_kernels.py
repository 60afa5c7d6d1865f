"""Import before open_clip: lets torchvision's published build import beside a CPU build of torch.

torchvision attaches shape functions and fallbacks to operators that its compiled part declares. Where that part cannot be
loaded the operators are unknown and the import fails. Declaring their signatures is enough: CLIP calls none of them.
"""

import torch

BOX = "Tensor dets, Tensor scores, float iou_threshold"
POOLED = "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width"
OFFSETS = (
    "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, int stride_h, int stride_w, int pad_h, int pad_w, "
    "int dilation_h, int dilation_w, int groups, int offset_groups, bool use_mask"
)
SIGNATURES = (
    f"nms({BOX}) -> Tensor",
    f"qnms({BOX}) -> Tensor",
    f"roi_align({POOLED}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({POOLED}) -> (Tensor, Tensor)",
    f"ps_roi_align({POOLED}, int sampling_ratio) -> (Tensor, Tensor)",
    f"ps_roi_pool({POOLED}) -> (Tensor, Tensor)",
    f"deform_conv2d({OFFSETS}) -> Tensor",
)

# lives as long as its declarations are wanted
LIBRARY = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
for signature in SIGNATURES:
    LIBRARY.define(signature)  # type: ignore[no-untyped-call]
