"""A split through a real (tiny) dual encoder: retrieval from files, the same on any number of ranks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from fmray.config.schema import (
    DataConfig,
    EvaluateConfig,
    EvaluateRunConfig,
    FolderSource,
    JsonlSource,
)
from fmray.data.loader import caption_key
from fmray.data.sources import open_source
from fmray.errors import DataError
from fmray.evaluation.embed import (
    classify_captions,
    embed_pairs,
    embed_texts,
    evaluate,
    evaluate_pairs,
    measuring,
    without_common_start,
)
from fmray.models.saved import LoadedDualEncoder, save_dual_encoder
from fmray.types import Metrics
from tests.tiny import tiny_model
from tests.unit.evaluation.contexts import context
from tests.workers import run_workers

WORDS = ["red", "green", "blue", "grey", "dark", "light", "wide", "small", "a", "of"]
COUNT = 23


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1} | {w: i for i, w in enumerate(WORDS, 2)}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def tiny_encoder() -> LoadedDualEncoder:
    model = tiny_model(dropout=0.5).eval()
    return LoadedDualEncoder(model, tiny_tokenizer(), model.image, model.config.max_tokens)


def picture(index: int) -> bytes:
    pixels = torch.randint(0, 256, (20, 16, 3), generator=torch.Generator().manual_seed(index)).byte()
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(stream, "PNG")
    return stream.getvalue()


def caption(index: int) -> str:
    return f"a {WORDS[index % 5]} {WORDS[index // 5 % 10]} {WORDS[index % 7]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """23 pictures as jsonl; every third has two captions, one of them damaged when a test says so."""
    lines = []
    for index in range(COUNT):
        (tmp_path / f"{index}.png").write_bytes(picture(index))
        captions = [caption(index), f"wide {caption(index + 40)}"] if index % 3 == 0 else [caption(index)]
        lines.append(json.dumps({"image": f"{index}.png", "caption": captions}))
    (tmp_path / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def measure(rank: int, world_size: int, folder: str, batch_size: int = 4) -> Metrics:
    encoder = tiny_encoder()
    data = DataConfig(source=JsonlSource(path=folder), max_bad_share=0.1)
    config = EvaluateConfig(batch_size=batch_size, templates=("{}", "a {}"))
    parts = encoder.model, encoder.tokenizer, encoder.image, encoder.max_tokens
    return evaluate_pairs(*parts, data, config, context(rank, world_size))


def test_pairs_carry_every_caption_and_the_place_in_the_split(folder: Path) -> None:
    encoder, source = tiny_encoder(), open_source(JsonlSource(path=str(folder)), "test")
    with measuring(encoder.model):
        pairs = embed_pairs(encoder, source, EvaluateConfig(batch_size=5), 0.0, context())
        alone = encoder.model.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert pairs.sample_N.tolist() == list(range(COUNT))
    assert len(pairs.text_PD) == COUNT + 8
    assert pairs.owner_P[:6].tolist() == [0, 0, 1, 2, 3, 3]
    assert pairs.caption_P[2] == caption_key(caption(1))
    assert pairs.image_ND.norm(dim=1) == pytest.approx(torch.ones(COUNT), abs=1e-6)
    assert pairs.image_ND.dtype == torch.float32
    assert not alone.requires_grad


def test_templates_are_averaged_and_padding_changes_nothing() -> None:
    encoder = tiny_encoder()
    with measuring(encoder.model):
        together = embed_texts(encoder, ["red", "a dark blue of light wide"])
        assert torch.allclose(embed_texts(encoder, ["red"]), together[:1], atol=1e-6)
        both = embed_texts(encoder, ["red"], ("{}", "a {}"))
        mean = together[:1] + embed_texts(encoder, ["a red"])
    assert torch.allclose(both, torch.nn.functional.normalize(mean, dim=1), atol=1e-6)


def test_the_model_is_left_as_it_was_found_and_measured_without_dropout(folder: Path) -> None:
    encoder = tiny_encoder()
    encoder.model.train()
    encoder.model.text.eval()  # a locked tower
    before = [module.training for module in encoder.model.modules()]
    parts = encoder.model, encoder.tokenizer, encoder.image, encoder.max_tokens
    data = DataConfig(source=JsonlSource(path=str(folder)))
    first, again = (evaluate_pairs(*parts, data, EvaluateConfig(), context()) for _ in range(2))
    assert first == again
    assert [module.training for module in encoder.model.modules()] == before
    assert torch.is_grad_enabled()


def test_autocast_around_it_does_not_reach_the_evaluation(folder: Path) -> None:
    alone = measure(0, 1, str(folder))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measure(0, 1, str(folder)) == alone


def test_a_few_damaged_pictures_are_left_out_and_many_are_an_error(folder: Path) -> None:
    whole = measure(0, 1, str(folder))
    (folder / "2.png").write_bytes(b"not a picture")
    assert measure(0, 1, str(folder)) != whole
    for index in (5, 9):
        (folder / f"{index}.png").write_bytes(picture(index)[:60])
    with pytest.raises(DataError, match=r"3 of 23 .* data\.max_bad_share=0\.1"):
        measure(0, 1, str(folder))


def test_only_the_first_samples_when_asked(folder: Path) -> None:
    encoder, source = tiny_encoder(), open_source(JsonlSource(path=str(folder)), "test")
    config = EvaluateConfig(batch_size=4, max_samples=6)
    with measuring(encoder.model):
        assert embed_pairs(encoder, source, config, 0.0, context()).sample_N.tolist() == list(range(6))


def test_evaluating_a_saved_model_on_folders_of_classes_writes_the_confusion(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_dual_encoder(encoder.model, encoder.tokenizer, tmp_path / "model")
    for index in range(12):
        file = tmp_path / "data" / "test" / f"{WORDS[index % 3]}_{WORDS[8]}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(index))
    config = EvaluateRunConfig(
        checkpoint=str(tmp_path / "model"), data=DataConfig(source=FolderSource(path=str(tmp_path / "data")))
    )
    reported: list[tuple[int, Metrics]] = []
    where = context(folder=str(tmp_path / "run"))
    where.reporters.append(lambda step, metrics: reported.append((step, metrics)))
    assert evaluate(config, where).finished
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    metrics = written["metrics"]
    assert reported == [(0, metrics)]
    assert sorted(written["classes"]) == ["blue a", "green a", "red a"]
    confusion = torch.tensor(written["confusion"])
    assert confusion.sum(1).tolist() == [4, 4, 4]
    assert metrics["eval/zero_shot/top1"] == pytest.approx(int(confusion.trace()) / 12)
    # a class's caption counts once in the gallery, so the nearest caption is the predicted class
    assert metrics["eval/zero_shot/top1"] == metrics["eval/image_to_text/r1"]


def measure_in_batches(rank: int, world_size: int, folder: str, sizes: list[int]) -> list[Metrics]:
    return [measure(rank, world_size, folder, size) for size in sizes]


@pytest.mark.slow
def test_three_ranks_give_the_numbers_of_one(folder: Path) -> None:
    (folder / "7.png").write_bytes(b"damaged, on one rank")
    sizes = [4, 16]  # 6 batches; 2 batches, so that the third rank has none
    alone = measure_in_batches(0, 1, str(folder), sizes)
    for metrics in run_workers(3, measure_in_batches, str(folder), sizes):
        assert metrics == alone


def test_equal_captions_have_equal_keys_in_int64() -> None:
    assert caption_key("개 얼굴") == caption_key("개 얼굴") != caption_key("개")
    assert torch.tensor([caption_key(str(i)) for i in range(100)]).unique().numel() == 100


@pytest.mark.parametrize(
    ("captions", "names"),
    [
        (["a photo of a cat", "a photo of a cow"], ["cat", "cow"]),  # not "at" and "ow"
        (["a fish", "a fish tank"], ["fish", "fish tank"]),
        (["cat", "dog"], ["cat", "dog"]),
        (["a cat"], ["cat"]),
    ],
)
def test_class_names_lose_the_sentence_they_share(captions: list[str], names: list[str]) -> None:
    assert without_common_start(captions) == names


def test_captions_of_their_own_are_no_classes(folder: Path) -> None:
    encoder, source = tiny_encoder(), open_source(JsonlSource(path=str(folder)), "test")
    with measuring(encoder.model):
        pairs = embed_pairs(encoder, source, EvaluateConfig(), 0.0, context())
    assert classify_captions(source, pairs, context()) is None
