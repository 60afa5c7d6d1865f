"""Prompts: where they come from, how they are cut, and in which order they are asked."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fmray.config.loading import validate
from fmray.config.prompts import (
    HubPromptSource,
    JsonlPromptSource,
    PromptConfig,
    PromptSourceConfig,
    ReviewPromptSource,
)
from fmray.data.prompts import Prompt, PromptOrder, first_sentence, fit_prompt, open_prompts
from fmray.data.reviews import Review, folded
from fmray.errors import ConfigError, DataError

# -------------------------------------------------------------------------------- configuration


def test_source_is_chosen_by_its_kind_and_is_reviews_by_default() -> None:
    source = TypeAdapter(PromptSourceConfig).validate_python({"words": [2, 3]})
    assert source == ReviewPromptSource(words=(2, 3))
    assert PromptConfig.model_validate(
        {"source": {"kind": "jsonl", "path": "x"}}
    ).source == JsonlPromptSource(path="x")
    with pytest.raises(ValidationError, match="union_tag_invalid"):
        PromptConfig.model_validate({"source": {"kind": "csv"}})


def test_wrong_values_name_their_key() -> None:
    with pytest.raises(ConfigError, match=r"prompts\.source\.words=\[5, 4\]: write \[min, max\]"):
        validate(PromptConfig, {"source": {"words": [5, 4]}})
    for template in ("no place", "{} and {}"):
        with pytest.raises(ConfigError, match=r"prompts\.template=.*write \{\} once"):
            validate(PromptConfig, {"template": template})


# -------------------------------------------------------------------------------- your own


def write_lines(folder: Path, split: str, rows: list[Any]) -> None:
    (folder / f"{split}.jsonl").write_text(
        "\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8"
    )


def test_jsonl_prompts_wear_the_template_and_count_from_zero(tmp_path: Path) -> None:
    write_lines(tmp_path, "train", [{"q": "one {}"}, {"q": "two"}, {"q": "three"}])
    write_lines(tmp_path, "test", [{"q": "four"}])
    source = JsonlPromptSource(path=str(tmp_path), text_key="q")
    config = PromptConfig(source=source, template="Say: {}!", max_prompts=2)
    assert open_prompts(config, "train") == (Prompt(0, "Say: one {}!"), Prompt(1, "Say: two!"))
    assert open_prompts(config, "test") == (Prompt(0, "Say: four!"),)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"q": " \n"}, r"train\.jsonl:2: the prompt is empty"),
        ({"q": 3}, r"train\.jsonl:2: the prompt must be a string, not int"),
        ({"p": "x"}, r"train\.jsonl:2: has no key 'q'; there are p"),
        (["x"], r"train\.jsonl:2: must be an object with keys"),
    ],
)
def test_a_bad_line_is_named(row: Any, said: str, tmp_path: Path) -> None:
    write_lines(tmp_path, "train", [{"q": "fine"}, row])
    with pytest.raises(DataError, match=said):
        open_prompts(PromptConfig(source=JsonlPromptSource(path=str(tmp_path), text_key="q")), "train")


def test_missing_files_and_empty_splits_are_said(tmp_path: Path) -> None:
    config = PromptConfig(source=JsonlPromptSource(path=str(tmp_path)))
    with pytest.raises(DataError, match=r"prompts\.source\.path=.*holds no test\.jsonl"):
        open_prompts(config, "test")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the test split of kind=jsonl has no prompts"):
        open_prompts(config, "test")
    with pytest.raises(DataError, match=r"prompts\.source\.path='/no/where': no such folder"):
        open_prompts(PromptConfig(source=JsonlPromptSource(path="/no/where")), "train")


def test_hub_prompts_from_a_saved_dataset(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in
             {"train": ["a", "b", "c"], "heldout": ["d", " "]}.items()}  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    source = HubPromptSource(path=str(tmp_path), column="text", train_split="train[:2]", test_split="heldout")
    assert [prompt.text for prompt in open_prompts(PromptConfig(source=source), "train")] == ["a", "b"]
    with pytest.raises(DataError, match=r"\[heldout\]#1: the prompt is empty"):
        open_prompts(PromptConfig(source=source), "test")
    with pytest.raises(DataError, match=r"prompts\.source\.column='x': .* there are text"):
        open_prompts(PromptConfig(source=source.replace(column="x")), "train")
    with pytest.raises(DataError, match=r"prompts\.source\.path=.*split 'dev' cannot be loaded"):
        open_prompts(PromptConfig(source=source.replace(train_split="dev")), "train")


# -------------------------------------------------------------------------------- movie reviews


def test_first_sentence_joins_spaced_out_marks() -> None:
    spaced = "a date , but it's ( nearly ) worth it . for starters , no ."
    assert first_sentence(Review(spaced, True, "rotten_tomatoes")) == "a date, but it's (nearly) worth it."
    assert first_sentence(Review('He said "go." Then\nleft.', True, "imdb")) == 'He said "go."'
    assert first_sentence(Review("A headline\nand a text.", True, "imdb")) == "A headline"


@pytest.mark.assets
def test_review_prompts_are_natural_unfinished_and_never_shared() -> None:
    config = PromptConfig(source=ReviewPromptSource(words=(4, 8)))
    train, test = open_prompts(config, "train"), open_prompts(config, "test")
    assert (len(train), len(test)) == (27_190, 1_734)
    assert [prompt.index for prompt in train] == list(range(len(train)))
    seen = {folded(prompt.text) for prompt in train}
    assert len(seen) == len(train)
    assert not seen & {folded(prompt.text) for prompt in test}
    lengths = Counter(len(prompt.text.split()) for prompt in train)
    assert set(lengths) == {4, 5, 6, 7, 8}
    assert max(lengths.values()) < 1.5 * min(lengths.values())
    assert not any(re.search(r"[<>*_@/\n]|http|[.!?]$| [,.]", prompt.text) for prompt in train + test)
    assert open_prompts(config.replace(max_prompts=3), "train") == train[:3]


@pytest.mark.assets
def test_first_prompts_are_a_fair_sample_of_both_sources() -> None:
    test = open_prompts(PromptConfig(), "test")
    imdb = {
        prompt.text for prompt in open_prompts(PromptConfig(source=ReviewPromptSource(source="imdb")), "test")
    }
    shares = [sum(prompt.text in imdb for prompt in part) / len(part) for part in (test[:200], test)]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)


# -------------------------------------------------------------------------------- tokens


class Letters:
    """Tokenizes into words of at most four letters, with an end token like T5's."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        pieces = re.findall(r"\S{1,4}", text)
        return {"input_ids": [int.from_bytes(piece.encode(), "big") for piece in pieces] + [1]}


def read(ids: list[int]) -> list[str]:
    assert ids[-1] == 1
    return [value.to_bytes(20, "big").lstrip(b"\0").decode() for value in ids[:-1]]


@pytest.mark.parametrize(
    ("text", "limit", "kept"),
    [
        ("all of it fits", 5, "all of it fits"),
        ("one two\nthe next line goes on", 5, "one two"),  # a line end goes before a word's
        ("one two. And then more", 5, "one two."),  # a sentence end as well
        ("one two. two four\nlast line goes", 6, "one two. two four"),  # and a line end before a sentence's
        (
            "Mr. Blue was a very good man",
            7,
            "Mr. Blue was a very good",
        ),  # but not where half the room is lost
        ("one Constantinople two", 4, "one"),  # never inside a word
        ("one two three", 3, "one two"),
    ],
)
def test_long_prompts_end_at_a_natural_place(text: str, limit: int, kept: str) -> None:
    assert read(fit_prompt(text, Letters(), limit)) == read(Letters()(kept)["input_ids"])


def test_template_survives_the_cut() -> None:
    ids = fit_prompt("Review: good old film noir -> go", Letters(), 7, ending=" -> go")
    assert read(ids) == ["Revi", "ew:", "good", "old", "->", "go"]


def test_prompts_that_cannot_be_cut_are_named() -> None:
    for empty in ("", "  \n", " -> go"):
        with pytest.raises(DataError, match=re.escape(f"prompt {empty!r}: is empty")):
            fit_prompt(empty, Letters(), 8, ending=" -> go")
    with pytest.raises(DataError, match=r"prompt 'Llanfairpwll': no whole word .* prompts\.max_tokens=3"):
        fit_prompt("Llanfairpwll", Letters(), 3)


@given(st.text(alphabet="ab .\n", min_size=1, max_size=60), st.integers(2, 20))
@settings(max_examples=200, deadline=None)
def test_a_cut_prompt_fits_and_is_a_beginning_in_whole_words(text: str, limit: int) -> None:
    try:
        kept = read(fit_prompt(text, Letters(), limit))
    except DataError:
        first = text.split()[:1]
        assert not first or len(Letters()(first[0])["input_ids"]) > limit
        return
    assert 0 < len(kept) < limit
    starts = [read(Letters()(text[: match.end()])["input_ids"]) for match in re.finditer(r"\S(?=\s|$)", text)]
    assert kept in starts


@pytest.mark.assets
def test_t5_prompts_keep_their_end_token() -> None:
    from transformers import AutoTokenizer

    from fmray.assets import fetch

    tokenizer = AutoTokenizer.from_pretrained(fetch("flan_t5_small"))
    long = "The plot makes little sense. " * 5 + "But the acting is wonderful."
    ids = fit_prompt(long, tokenizer, 20)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(["The plot makes little sense."] * 3)
    assert len(ids) <= 20


# -------------------------------------------------------------------------------- order


def test_every_epoch_asks_each_prompt_once_in_another_order() -> None:
    order = PromptOrder(count=7, seed=3)
    epochs = [order.indices(start, start + 7) for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order.indices(5, 9) == [*epochs[0][5:], *epochs[1][:2]]
    assert order[12] == PromptOrder(7, 3)[12] == epochs[1][5]
    assert PromptOrder(7, 4).indices(0, 7) != epochs[0]


def test_order_over_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="an order over 0 prompts"):
        PromptOrder(0, 0)
