"""Zero-shot classification: the class whose sentence lies nearest to the picture.

N pictures  C classes  D width of the shared space  (lower case n: this rank's share)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.errors import DataError
from fmray.evaluation.retrieval import gather_rows, ranks_of_positives, recall_at, top_matches
from fmray.runtime.context import Context
from fmray.types import Metrics

EncodeText = Callable[[list[str]], Tensor]
"""Sentences to unit vectors, float32 [number of sentences, D]."""


def class_embeddings(encode_text: EncodeText, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit vector per class, float32 [C, D]: the mean over templates of unit vectors, normalised again.

    Prompt ensembling as in CLIP (Radford et al. 2021, §3.1.4) and open_clip's `build_zero_shot_classifier`.
    """
    sentences = [[template.replace("{}", name) for name in class_names] for template in templates]
    per_template_CD = [F.normalize(encode_text(texts).float(), dim=-1) for texts in sentences]
    return F.normalize(torch.stack(per_template_CD).mean(dim=0), dim=-1)


def classify(image_ND: Tensor, class_CD: Tensor, *, scale: float = 100.0) -> Tensor:
    """Probability of each class, float32 [N, C]: softmax of scale·cosine; 100 is CLIP's largest scale."""
    return torch.softmax(scale * image_ND.float() @ class_CD.float().T, dim=-1)


def confusion_matrix(label_N: Tensor, predicted_N: Tensor, classes: int) -> Tensor:
    """Counts int64 [C, C]: row the true class, column the predicted one."""
    return torch.bincount(label_N * classes + predicted_N, minlength=classes**2).view(classes, classes)


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """A classification measured.

    `ZeroShot({"eval/zero_shot/top1": 0.7, …}, confusion_CC=tensor([[5, 1], [0, 4]]))`
    """

    metrics: Metrics
    confusion_CC: Tensor
    """int64, row the true class, column the predicted one."""


def evaluate_zero_shot(
    image_nD: Tensor, label_n: Tensor, class_CD: Tensor, context: Context, prefix: str = "eval"
) -> ZeroShot:
    """Top-1 and top-5 accuracy and confusion of all ranks' pictures; every rank gets the same numbers.

    `label_n` int64 is the row of `class_CD` that each of this rank's pictures belongs to. A tie goes to the
    earlier class. `<prefix>/zero_shot/top5` is left out where there are fewer than six classes. Raises
    DataError where there is no picture at all, a label is not a class, or an embedding is not finite.
    """
    classes = len(class_CD)
    outside_n = (label_n < 0) | (label_n >= classes)
    diverged_n = ~image_nD.isfinite().all(dim=1)
    # summed first, so that all ranks stop where one has reason to
    outside, diverged = context.sum(torch.stack([outside_n.sum(), diverged_n.sum()])).tolist()
    if outside:
        raise DataError(f"{outside} labels are not among the {classes} classes")
    if diverged:
        raise DataError(f"{diverged} embeddings are not finite: the model has diverged")
    class_row_C = torch.arange(classes, device=class_CD.device)
    rank_N = gather_rows(ranks_of_positives(image_nD, class_CD, label_n, class_row_C), context)
    if not len(rank_N):
        raise DataError("no picture to classify")
    predicted_n = top_matches(image_nD, class_CD, 1)[1][:, 0]
    confusion_CC = context.sum(confusion_matrix(label_n, predicted_n, classes))
    recall = recall_at(rank_N, ks=(1, 5))
    metrics = {f"{prefix}/zero_shot/top1": recall["r1"]}
    if classes > 5:
        metrics[f"{prefix}/zero_shot/top5"] = recall["r5"]
    return ZeroShot(metrics, confusion_CC)
