"""What a report shows of a model: pictures with the captions they find, and the reverse; a confusion.

N queries  M gallery  D width of the shared space
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmray.config.schema import DataConfig, EvaluateConfig
from fmray.data.sources import Source
from fmray.evaluation.embed import caption_of, classify_captions, embedded_splits
from fmray.evaluation.retrieval import PairEmbeddings, ranks_of_positives, top_matches
from fmray.models.saved import LoadedDualEncoder
from fmray.pipeline.sections import Answer, Exhibit, Gallery, Matrix
from fmray.runtime.context import Context

ANSWERS = 5
RIGHT, WRONG = 6, 6
"""Queries of a gallery whose first answer is right, and whose is not."""

Show = Callable[[int], tuple[str, bytes | None]]
"""What stands for a row of the gallery: its text, and its picture where it is one."""


def exhibits(
    encoder: LoadedDualEncoder, data: DataConfig, evaluate: EvaluateConfig, context: Context
) -> list[Gallery | Matrix]:
    """Both galleries of the test split (for emoji, of each language); a confusion where captions are classes.

    For one process: `context` is rank 0 of 1. Raises DataError as `evaluate_pairs` does.
    """
    sections: list[Gallery | Matrix] = []
    for prefix, source, pairs in embedded_splits(encoder, data, evaluate, context):
        language = prefix.partition("/")[2]
        sections += galleries(source, pairs, f" ({language})" if language else "")
        if classified := classify_captions(source, pairs, context):
            names, result = classified
            counts = tuple(tuple(row) for row in result.confusion_CC.tolist())
            share = f"{result.metrics['eval/zero_shot/top1']:.1%} of {len(pairs.image_ND):,} pictures right"
            note = f"{share}, {1 / len(names):.1%} by chance. Darker: a larger share of the true class."
            sections.append(Matrix("Zero-shot classification", tuple(names), counts, note))
    return sections


def galleries(source: Source, own: PairEmbeddings, suffix: str = "") -> tuple[Gallery, Gallery]:
    """Pictures with their nearest captions, captions with their nearest pictures; right and wrong ones."""
    pairs, image_key, text_key = own.distinct()

    def picture(row: int) -> tuple[str, bytes]:
        sample = source[int(pairs.sample_N[row])]
        return sample.captions[0], sample.image

    def caption(row: int) -> tuple[str, None]:
        return caption_of(source, pairs, row), None

    image, text = (pairs.image_ND, image_key, picture), (pairs.text_PD, text_key, caption)
    images, texts = f"{len(pairs.image_ND):,} pictures", f"{len(pairs.text_PD):,} captions"
    return (
        Gallery(
            f"Pictures and the captions they find{suffix}",
            tuple(_queries(*image, *text)),
            f"Test pictures, each with the {ANSWERS} nearest of {texts} and the cosine; ✓ marks a right one.",
        ),
        Gallery(
            f"Captions and the pictures they find{suffix}",
            tuple(_queries(*text, *image)),
            f"Test captions, each with the {ANSWERS} nearest of {images} and the cosine; ✓ marks a right one.",
        ),
    )


def _queries(
    query_ND: Tensor,
    query_key_N: Tensor,
    show_query: Show,
    gallery_MD: Tensor,
    gallery_key_M: Tensor,
    show_answer: Show,
) -> list[Exhibit]:
    rank_N = ranks_of_positives(query_ND, gallery_MD, query_key_N, gallery_key_M)
    chosen = torch.cat([spread((rank_N == 0).nonzero()[:, 0], RIGHT), spread(rank_N.nonzero()[:, 0], WRONG)])
    scores, rows = top_matches(query_ND[chosen], gallery_MD, ANSWERS)
    shown = []
    for place, query in enumerate(chosen.tolist()):
        answers = []
        for score, row in zip(scores[place].tolist(), rows[place].tolist(), strict=True):
            words, picture = show_answer(row)
            answers.append(Answer(words, score, bool(gallery_key_M[row] == query_key_N[query]), picture))
        rank = int(rank_N[query])
        badge = "found first" if rank == 0 else f"place {rank + 1}"
        shown.append(Exhibit(*show_query(query), tuple(answers), badge, good=rank == 0))
    return shown


def spread(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows, evenly from first to last: `spread(tensor([1, 2, 3, 4]), 2)` is [1, 3]."""
    if len(rows) <= most:
        return rows
    return rows[torch.arange(most, device=rows.device) * len(rows) // most]
