"""Retrieval against hand-made cases and a reference that compares everything with everything in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fmray.errors import DataError
from fmray.evaluation.retrieval import (
    PairEmbeddings,
    evaluate_retrieval,
    gather_rows,
    median_rank,
    on_grid,
    own_share,
    ranks_of_positives,
    recall_at,
    top_matches,
)
from fmray.types import Metrics
from tests.unit.evaluation.contexts import context
from tests.workers import run_workers


def reference_ranks(
    query: Tensor, gallery: Tensor, query_key: list[int], gallery_key: list[int]
) -> list[int]:
    """Sort the whole gallery (a stable sort: earlier wins), look for the first row with the query's key."""
    ranks = []
    for q, key in enumerate(query_key):
        scores = [sum(a * b for a, b in zip(query[q].tolist(), row.tolist(), strict=True)) for row in gallery]
        order = sorted(range(len(scores)), key=lambda m: -scores[m])
        ranks.append(next(place for place, m in enumerate(order) if gallery_key[m] == key))
    return ranks


def clip_benchmark_ranks(similarity_NM: Tensor) -> Tensor:
    """open_clip 3.3.0 `get_clip_metrics`: rank = #greater + #equal before, for one-to-one pairs."""
    truth = similarity_NM.diagonal()[:, None]
    before = torch.arange(len(similarity_NM))[None] < torch.arange(len(similarity_NM))[:, None]
    return (similarity_NM > truth).sum(1) + ((similarity_NM == truth) & before).sum(1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_equal_the_reference_with_ties_and_several_positives(data: st.DataObject) -> None:
    integers = st.integers(-2, 2)  # few values, so that ties abound; exact in Python too
    gallery = data.draw(st.lists(st.tuples(integers, integers, integers), min_size=1, max_size=12))
    gallery_key = data.draw(st.lists(st.integers(0, 3), min_size=len(gallery), max_size=len(gallery)))
    queries = data.draw(st.lists(st.tuples(integers, integers, integers), min_size=1, max_size=8))
    query_key = data.draw(
        st.lists(st.sampled_from(gallery_key), min_size=len(queries), max_size=len(queries))
    )
    query_ND, gallery_MD = torch.tensor(queries).float(), torch.tensor(gallery).float()
    expected = reference_ranks(query_ND, gallery_MD, query_key, gallery_key)
    for chunk in (1, 3, None):
        keys = torch.tensor(query_key), torch.tensor(gallery_key)
        assert ranks_of_positives(query_ND, gallery_MD, *keys, chunk=chunk).tolist() == expected


def test_one_to_one_pairs_with_ties_agree_with_open_clip() -> None:
    images, texts = torch.randint(-1, 2, (2, 40, 4), generator=torch.Generator().manual_seed(0)).float()
    keys = torch.arange(40)
    assert torch.equal(ranks_of_positives(images, texts, keys, keys), clip_benchmark_ranks(images @ texts.T))


def test_a_tie_goes_to_the_earlier_row() -> None:
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]] * 3)
    for place in range(3):
        key = torch.tensor([place])
        assert ranks_of_positives(query, gallery, key, torch.arange(3)).tolist() == [place]
    assert top_matches(query, gallery, 2)[1].tolist() == [[0, 1]]


def test_collapsed_model_scores_chance_not_perfection() -> None:
    same, keys = F.normalize(torch.ones(20, 8), dim=1), torch.arange(20)
    assert ranks_of_positives(same, same, keys, keys).tolist() == list(range(20))


def test_similarities_do_not_depend_on_what_is_computed_beside_them() -> None:
    """float32 similarities do: the same pair gets different last bits in different chunks."""
    rows = F.normalize(torch.randn(257, 384, generator=torch.Generator().manual_seed(0)), dim=1)
    exact = on_grid(rows)
    whole = exact @ exact.T
    for chunk in (1, 3, 64):
        parts = torch.cat([part @ exact.T for part in exact.split(chunk)])
        assert torch.equal(parts, whole)
    reordered = torch.randperm(384, generator=torch.Generator().manual_seed(1))
    assert torch.equal(exact[:, reordered] @ exact[:, reordered].T, whole)
    assert (whole - rows.double() @ rows.double().T).abs().max() < 1e-7


def test_recall_and_median_in_closed_form() -> None:
    ranks = torch.tensor([0, 0, 3, 4, 9, 10])
    assert recall_at(ranks) == pytest.approx({"r1": 2 / 6, "r5": 4 / 6, "r10": 5 / 6})
    assert median_rank(ranks) == 4  # floor((3 + 4) / 2) + 1
    assert median_rank(torch.tensor([0, 7, 2])) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_model_is_an_error_not_a_perfect_score(bad: float) -> None:
    rows, keys = torch.eye(3), torch.arange(3)
    broken = rows.clone()
    broken[1, 1] = bad
    for query, gallery in ((broken, rows), (rows, broken)):
        with pytest.raises(DataError, match="diverged"):
            ranks_of_positives(query, gallery, keys, keys)


def test_a_query_without_positive_is_an_error() -> None:
    with pytest.raises(DataError, match="no positive"):
        ranks_of_positives(torch.eye(2), torch.eye(2), torch.tensor([0, 5]), torch.tensor([0, 1]))


# Two pictures of dogs share "dog"; the second is also "puppy"; a cat has two captions of its own.
SHARED = PairEmbeddings(
    image_ND=torch.eye(3),
    sample_N=torch.arange(3),
    text_PD=torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0.6, 0.8], [0, 0.6, 0.8], [0, 0, 1.0]]),
    owner_P=torch.tensor([0, 1, 1, 2, 2]),
    caption_P=torch.tensor([70, 70, -5, 33, 34]),
)


def test_pictures_that_share_a_caption_are_positives_and_captions_count_once() -> None:
    pairs, image_key, text_key = SHARED.distinct()
    assert image_key.tolist() == [0, 0, 2]
    assert pairs.caption_P.tolist() == [70, -5, 33, 34]
    assert text_key.tolist() == [0, 0, 2, 2]


def test_retrieval_of_several_captions_per_picture_in_closed_form() -> None:
    metrics = evaluate_retrieval(SHARED, context())
    # picture 1 finds "puppy" (0.6), tied with cat's first caption, which stands later
    assert metrics["eval/image_to_text/r1"] == 1.0
    # "puppy" lies nearer to the cat (0.8) than to its own picture: the one miss among four captions
    assert metrics["eval/text_to_image/r1"] == pytest.approx(3 / 4)
    assert metrics["eval/text_to_image/r5"] == 1.0
    assert metrics["eval/text_to_image/median_rank"] == 1


def test_chains_of_shared_captions_are_one_group() -> None:
    owner, caption = torch.tensor([0, 1, 1, 2, 2, 3]), torch.tensor([1, 1, 2, 2, 3, 9])
    pairs = PairEmbeddings(torch.eye(4), torch.arange(4), torch.zeros(6, 4), owner, caption)
    assert pairs.distinct()[1].tolist() == [0, 0, 0, 3]


def test_keeping_and_joining_pairs_renumbers_the_owners() -> None:
    kept = SHARED.only(torch.tensor([True, False, True]))
    assert (kept.owner_P.tolist(), kept.caption_P.tolist()) == ([0, 1, 1], [70, 33, 34])
    assert kept.sample_N.tolist() == [0, 2]
    assert PairEmbeddings.joined([kept, SHARED]).owner_P.tolist() == [0, 1, 1, 2, 3, 3, 4, 4]
    assert PairEmbeddings.joined([SHARED.only(torch.zeros(3, dtype=torch.bool))]).owner_P.tolist() == []


def test_nothing_to_rank_is_an_error() -> None:
    with pytest.raises(DataError, match="no picture"):
        evaluate_retrieval(SHARED.only(torch.zeros(3, dtype=torch.bool)), context())


# ------------------------------------------------------------------------------------------ several processes


def random_pairs(images: int) -> PairEmbeddings:
    """Close embeddings (so that ranks differ), one to three captions each, every seventh caption shared."""
    random = torch.Generator().manual_seed(images)
    image = F.normalize(torch.randn(images, 16, generator=random), dim=1)
    owner = torch.arange(images).repeat_interleave(torch.randint(1, 4, (images,), generator=random))
    text = F.normalize(image[owner] + 0.9 * torch.randn(len(owner), 16, generator=random), dim=1)
    caption = torch.arange(len(owner))
    caption[::7] = caption[::7] // 2 * 2
    return PairEmbeddings(image, torch.arange(images), text, owner, caption)


def share_of(pairs: PairEmbeddings, rank: int, world_size: int) -> PairEmbeddings:
    rows = torch.arange(len(pairs.image_ND))
    mine = own_share(rows, context(rank, world_size))
    return pairs.only((rows[:, None] == mine).any(dim=1))


def retrieval_on_rank(rank: int, world_size: int, sizes: list[int]) -> list[Metrics]:
    where = context(rank, world_size)
    return [evaluate_retrieval(share_of(random_pairs(n), rank, world_size), where) for n in sizes]


def uneven_rows_on_rank(rank: int, world_size: int) -> Tensor:
    return gather_rows(torch.full((rank % 2 * 2, 3), float(rank)), context(rank, world_size))


def diverged_on_rank(rank: int, world_size: int) -> str:
    """One rank's pictures are NaN: every rank must stop, none may wait for ever."""
    pairs = share_of(random_pairs(8), rank, world_size)
    if rank == 1:
        pairs.image_ND[0] = float("nan")
    with pytest.raises(DataError) as caught:
        evaluate_retrieval(pairs, context(rank, world_size))
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_numbers_of_one(world_size: int) -> None:
    sizes = [1, 2, 7, 60, 101]  # fewer pictures than ranks, and numbers that no world size divides
    alone = retrieval_on_rank(0, 1, sizes)
    assert 0 < alone[-1]["eval/image_to_text/r1"] < 1
    for metrics in run_workers(world_size, retrieval_on_rank, sizes):
        assert metrics == alone  # equal, not close


@pytest.mark.slow
def test_ranks_with_different_numbers_of_rows_gather_in_order() -> None:
    for rows in run_workers(4, uneven_rows_on_rank):
        assert rows[:, 0].tolist() == [1.0, 1.0, 3.0, 3.0]


@pytest.mark.slow
def test_all_ranks_stop_when_one_has_diverged() -> None:
    messages = run_workers(2, diverged_on_rank)
    assert messages[0] == messages[1]
    assert "1 of " in messages[0]
