"""Retrieval of captions by pictures and of pictures by captions, the same on any number of ranks.

N queries  M gallery  P captions  D width of the shared space  (lower case: this rank's share)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmray.errors import DataError
from fmray.runtime.context import Context
from fmray.types import Metrics

GRID = 2.0**25
SCORES_AT_ONCE = 2**24
"""Similarities in memory at once: 128 MiB of float64."""


def on_grid(embeds_ND: Tensor) -> Tensor:
    """Embeddings rounded to multiples of 2^-25, float64: their dot products are then exact.

    A product is a multiple of 2^-50, and no partial sum for vectors of norm up to 2 leaves 53 bits, so
    float64 rounds nothing, whatever the order of summation. Hence a similarity depends on its two vectors
    alone, not on the chunk, the thread count or the rank it was computed on, and equal vectors tie exactly.
    An entry moves by at most 2^-26 = 1.5e-8.
    """
    return (embeds_ND.double() * GRID).round() / GRID


def at_once(gallery: int) -> int:
    """Queries to compare at once with a gallery of this size."""
    return max(1, SCORES_AT_ONCE // max(1, gallery))


def slices(size: int, chunk: int) -> list[slice]:
    """`slices(5, 2)` is 0:2, 2:4, 4:5."""
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]


def top_matches(query_ND: Tensor, gallery_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each query's k best of the gallery: float64 scores [N, k], int64 rows [N, k]; ties: lower row first."""
    query_ND, gallery_DM = on_grid(query_ND), on_grid(gallery_MD).T
    scores_Nk = query_ND.new_empty((len(query_ND), min(k, len(gallery_MD))))
    rows_Nk = torch.empty_like(scores_Nk, dtype=torch.int64)
    for part in slices(len(query_ND), at_once(len(gallery_MD))):
        sorted_nM = (query_ND[part] @ gallery_DM).sort(dim=1, descending=True, stable=True)
        scores_Nk[part], rows_Nk[part] = sorted_nM.values[:, :k], sorted_nM.indices[:, :k]
    return scores_Nk, rows_Nk


def require_finite(embeds_ND: Tensor) -> None:
    """Raises DataError where an embedding is NaN or infinite."""
    bad_N = ~embeds_ND.isfinite().all(dim=1)
    if bool(bad_N.any()):
        raise DataError(
            f"{int(bad_N.sum())} of {len(bad_N)} embeddings are not finite: the model has diverged"
        )


def ranks_of_positives(
    query_ND: Tensor,
    gallery_MD: Tensor,
    query_key_N: Tensor,
    gallery_key_M: Tensor,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Place of each query's best positive in the gallery, int64 [N], 0 is first.

    Positives have the query's key. A tie goes to the earlier row: place = #greater + #equal before it, as in
    open_clip's `get_clip_metrics`. `chunk` queries are compared at once (None: as many as fit in 128 MiB).

    Raises DataError where a query has no positive, or an embedding is not finite (every comparison with NaN
    is false, so a model that diverged would come out first everywhere).
    """
    require_finite(query_ND)
    require_finite(gallery_MD)
    size = len(gallery_MD)
    query_ND, gallery_DM = on_grid(query_ND), on_grid(gallery_MD).T
    row_M = torch.arange(size, device=gallery_MD.device)
    rank_N = torch.empty_like(query_key_N)
    for part in slices(len(query_ND), chunk or at_once(size)):
        score_nM = query_ND[part] @ gallery_DM
        positive_nM = query_key_N[part, None] == gallery_key_M
        if not bool(positive_nM.any(dim=1).all()):
            raise DataError("a query has no positive in the gallery")
        best_n1 = score_nM.masked_fill(~positive_nM, -torch.inf).amax(dim=1, keepdim=True)
        equal_nM = score_nM == best_n1
        first_n1 = torch.where(equal_nM & positive_nM, row_M, size).amin(dim=1, keepdim=True)
        rank_N[part] = (score_nM > best_n1).sum(dim=1) + (equal_nM & (row_M < first_n1)).sum(dim=1)
    return rank_N


def recall_at(ranks_N: Tensor, ks: Sequence[int] = (1, 5, 10)) -> Metrics:
    """Share of queries whose best positive is among the first k: `{"r1": …, "r5": …, "r10": …}`."""
    return {f"r{k}": float((ranks_N < k).double().mean()) for k in ks}


def median_rank(ranks_N: Tensor) -> float:
    """Middle place, counted from 1: floor(median) + 1, as in open_clip's `get_clip_metrics`."""
    sorted_N, size = ranks_N.sort().values, len(ranks_N)
    return float((sorted_N[(size - 1) // 2] + sorted_N[size // 2]) // 2) + 1


def gather_rows(rows: Tensor, context: Context) -> Tensor:
    """Every rank's rows in the order of ranks, whatever each one's number: padded, gathered, cut."""
    counts = context.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    everything = context.gather(padded)
    starts = range(0, len(counts) * len(padded), len(padded)) if len(padded) else [0] * len(counts)
    return torch.cat([everything[start : start + count] for start, count in zip(starts, counts, strict=True)])


def own_share(rows: Tensor, context: Context) -> Tensor:
    """This rank's slice of rows that all ranks hold; the slices in the order of ranks are all rows."""
    each = -(-len(rows) // context.world_size)
    return rows[context.rank * each : (context.rank + 1) * each]


@dataclass(frozen=True, slots=True)
class PairEmbeddings:
    """Embedded pictures and their captions.

    `PairEmbeddings(image_ND, tensor([4, 5]), text_PD, tensor([0, 0, 1]), tensor([7, 9, 7]))`: samples 4 and
    5, the first with two captions, one of which the second has too.
    """

    image_ND: Tensor
    """float32, unit norm."""
    sample_N: Tensor
    """int64: the sample's place in its split."""
    text_PD: Tensor
    """float32, unit norm."""
    owner_P: Tensor
    """int64: the row of image_ND that a caption belongs to."""
    caption_P: Tensor
    """int64, equal for equal captions."""

    @classmethod
    def joined(cls, parts: Sequence[PairEmbeddings]) -> PairEmbeddings:
        """The pairs of several batches, one after the other."""
        starts = itertools.accumulate((len(part.image_ND) for part in parts), initial=0)
        return cls(
            torch.cat([part.image_ND for part in parts]),
            torch.cat([part.sample_N for part in parts]),
            torch.cat([part.text_PD for part in parts]),
            torch.cat([part.owner_P + start for part, start in zip(parts, starts, strict=False)]),
            torch.cat([part.caption_P for part in parts]),
        )

    def only(self, keep_N: Tensor) -> PairEmbeddings:
        """The pictures where `keep_N` (bool) is true, and their captions."""
        keep_P, new_row_N = keep_N[self.owner_P], keep_N.cumsum(0) - 1
        owner_P = new_row_N[self.owner_P[keep_P]]
        return PairEmbeddings(
            self.image_ND[keep_N],
            self.sample_N[keep_N],
            self.text_PD[keep_P],
            owner_P,
            self.caption_P[keep_P],
        )

    def gathered(self, context: Context) -> PairEmbeddings:
        """The pairs of all ranks, on every rank; needs memory for (N + P)·D numbers."""
        counts = context.gather(torch.tensor([len(self.image_ND)], device=self.image_ND.device))
        return PairEmbeddings(
            gather_rows(self.image_ND, context),
            gather_rows(self.sample_N, context),
            gather_rows(self.text_PD, context),
            gather_rows(self.owner_P + counts[: context.rank].sum(), context),
            gather_rows(self.caption_P, context),
        )

    def distinct(self) -> tuple[PairEmbeddings, Tensor, Tensor]:
        """Each caption once, and int64 keys of the pictures and of those captions; equal keys are positives.

        Pictures that share a caption are positives of all their captions, so a folder of classes and a
        caption file are measured alike. A key is the smallest picture row reachable over shared captions.
        """
        size, device = len(self.owner_P), self.owner_P.device
        group_P = torch.unique(self.caption_P, return_inverse=True)[1]
        row_P = torch.arange(size, device=device)
        first_G = torch.full_like(row_P, size).scatter_reduce(0, group_P, row_P, "amin")
        image_key_N = torch.arange(len(self.image_ND), device=device)
        while True:
            key_G = torch.full_like(row_P, size).scatter_reduce(0, group_P, image_key_N[self.owner_P], "amin")
            lower_N = image_key_N.scatter_reduce(0, self.owner_P, key_G[group_P], "amin")
            if torch.equal(lower_N, image_key_N):
                break
            image_key_N = lower_N
        once_P = first_G[group_P] == row_P
        text = self.text_PD[once_P], self.owner_P[once_P], self.caption_P[once_P]
        return PairEmbeddings(self.image_ND, self.sample_N, *text), image_key_N, key_G[group_P][once_P]


def evaluate_retrieval(own: PairEmbeddings, context: Context, prefix: str = "eval") -> Metrics:
    """Recall and median rank in both directions from each rank's own pairs; every rank gets the same numbers.

    Embeddings are gathered, similarities never: each rank ranks its share of the queries. Names are
    `<prefix>/image_to_text/r1`, `…/r5`, `…/r10`, `…/median_rank`, and the same under `text_to_image`.
    Raises DataError where there is nothing to rank, or as `ranks_of_positives` does.
    """
    pairs, image_key_N, text_key_P = own.gathered(context).distinct()
    if not len(image_key_N):
        raise DataError("no picture to evaluate retrieval on")
    require_finite(
        torch.cat([pairs.image_ND, pairs.text_PD])
    )  # here all ranks stop, below only the one concerned
    image, text = (pairs.image_ND, image_key_N), (pairs.text_PD, text_key_P)
    metrics: Metrics = {}
    for name, query, gallery in (("image_to_text", image, text), ("text_to_image", text, image)):
        mine, keys = (own_share(rows, context) for rows in query)
        ranks_N = gather_rows(ranks_of_positives(mine, gallery[0], keys, gallery[1]), context)
        measures = recall_at(ranks_N) | {"median_rank": median_rank(ranks_N)}
        metrics |= {f"{prefix}/{name}/{measure}": value for measure, value in measures.items()}
    return metrics
