"""Movie reviews: nothing crosses from the test split into training, however it is spelt."""

from __future__ import annotations

from collections import Counter

import pytest

from fmray.data.reviews import OPENING_WORDS, folded, load_reviews, plain, text_hash


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("One.<br /><br />Two.<br/>\tThree", "One.\nTwo.\nThree"),
        ("an <i>odd</i> film <grin> Samot&#345;i &amp; Co", "an odd film <grin> Samotři & Co"),
        ("wow \x96 four\x85 \x93stars\x94\x08", "wow – four… “stars”"),
        ("  <br /> edges <br /> ", "edges"),
    ],
)
def test_html_becomes_what_a_reader_sees(raw: str, read: str) -> None:
    assert plain(raw) == read


def test_folding_ignores_case_space_and_punctuation() -> None:
    assert (
        folded("A  Pretentious\nmess. ") == folded(". . . a pretentious mess . . .") == "a pretentious mess"
    )
    assert folded("good") != folded("goods")


def test_hashes_are_the_same_in_every_process() -> None:
    assert text_hash("a film") == 17737899656421379116


@pytest.mark.assets
def test_splits_hold_every_text_once_and_share_no_opening() -> None:
    train, test = load_reviews("train"), load_reviews("test")
    assert Counter(review.source for review in train) == {"imdb": 23_902, "rotten_tomatoes": 7_512}
    assert Counter(review.source for review in test) == {"imdb": 999, "rotten_tomatoes": 1_016}
    keys = [folded(review.text) for review in train + test]
    assert len(keys) == len(set(keys)) == 33_530 - 101  # 96 equal texts, 5 that differ in marks alone
    openings = [
        {" ".join(folded(review.text).split()[:OPENING_WORDS]) for review in part} for part in (train, test)
    ]
    assert not openings[0] & openings[1]
    assert not any("<br" in review.text or "\x96" in review.text for review in train + test)


@pytest.mark.assets
@pytest.mark.parametrize("source", ["imdb", "rotten_tomatoes"])
def test_held_out_reviews_are_balanced_and_stay_the_same(source: str) -> None:
    test = load_reviews("test", source)  # type: ignore[arg-type]
    assert 0.47 < sum(review.label for review in test) / len(test) < 0.53
    digest = text_hash("\n".join(review.text for review in test))
    assert digest == {"imdb": 2349647550803291309, "rotten_tomatoes": 16124841714793527329}[source]


@pytest.mark.assets
def test_labels_mean_what_they_say() -> None:
    """Words of praise stand in reviews that are labelled positive."""
    reviews = load_reviews("train")
    positive = {word: [r.label for r in reviews if word in r.text] for word in ("superb", "awful")}
    shares = {word: sum(labels) / len(labels) for word, labels in positive.items()}
    assert shares["superb"] > 0.75
    assert shares["awful"] < 0.2
