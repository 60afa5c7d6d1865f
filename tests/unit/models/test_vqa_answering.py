"""The VQA model's dialogues and words: batches, answers, likelihoods, what is remembered, saving, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from fmray.errors import CheckpointError, DataError
from fmray.models.answering import load_answering
from fmray.models.vqa import VqaModel
from fmray.models.vqa_answering import VqaAnswering, load_vqa
from fmray.types import Dialogue, Pictures, Turn
from tests.tiny_vqa import (
    asked,
    dialogues,
    pictures,
    question_tokenizer,
    tiny_vqa,
    tiny_vqa_config,
)

# ----------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_holds_pictures_and_questions_once_and_answers_in_full() -> None:
    answering = tiny_vqa()
    spoken = [
        asked("a", "1.png", "what color ?", "red"),
        asked("b", "0.png", "what color ?", "no yes"),
        asked("c", "1.png", "how many circle ?", "one"),
    ]
    batch = answering.collate(spoken, pictures())
    inputs, words = batch.inputs, answering.answer_tokenizer.get_vocab()
    red, no, yes, one = (words[word] for word in ("red", "no", "yes", "one"))
    # <|endoftext|> is 0: it begins, it ends, it fills; labels are told by length and never by number
    assert inputs["decoder_input_ids"].tolist() == [[0, red, 0, 0], [0, no, yes, 0], [0, one, 0, 0]]
    assert inputs["labels"].tolist() == [[0, red, 0, -100], [0, no, yes, 0], [0, one, 0, -100]]
    assert (batch.tokens, batch.dialogues) == (2 + 3 + 2, 3)
    assert inputs["picture_of_B"].tolist() == [0, 1, 0]
    given = pictures().pixels_NCHW
    assert given is not None
    assert torch.equal(inputs["pixel_values"], given[[1, 0]])  # the third is not asked about
    assert inputs["question_of_B"].tolist() == [0, 0, 1]
    read = [
        answering.question_tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert read == ["what color ?", "how many circle ?"]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]


def test_long_questions_and_answers_are_cut_and_an_answer_keeps_its_end() -> None:
    answering = tiny_vqa()
    inputs = answering.collate([asked("a", "0.png", "red " * 50, "blue " * 50)], pictures()).inputs
    assert inputs["input_ids"].shape == (1, 12)
    blue = answering.answer_tokenizer.get_vocab()["blue"]
    assert inputs["decoder_input_ids"].tolist() == [[0, blue, blue, blue, blue, 0]]  # 5 behind the start


def test_the_same_words_around_a_picture_are_one_question() -> None:
    answering = tiny_vqa()
    behind = Dialogue("a", ("0.png",), (Turn((" what color ? ", ""), "red"),))
    inputs = answering.collate([behind, asked("b", "0.png", "what color ?", "red")], pictures()).inputs
    assert len(inputs["input_ids"]) == 1


TWO_TURNS = (Turn(("", "what color ?"), "red"), Turn(("sure ?",), "yes"))


@pytest.mark.parametrize(
    ("dialogue", "message"),
    [
        (
            Dialogue("x", (), (Turn(("what color ?",), "red"),)),
            "dialogue 'x': the VQA model needs one picture, it has 0",
        ),
        (
            Dialogue("x", ("0.png", "1.png"), (Turn(("", "", "same ?"), "no"),)),
            "dialogue 'x': the VQA model needs one picture, it has 2: the multimodal LLM (model.kind=mllm) takes more",
        ),
        (
            Dialogue("x", ("0.png",), TWO_TURNS),
            "dialogue 'x': the VQA model answers one question, it has 2 turns: the multimodal LLM (model.kind=mllm) takes more",
        ),
        (
            asked("x", "0.png", "what color ?", "  "),
            "dialogue 'x': no answer token to learn from or to score",
        ),
        (
            asked("x", "9.png", "what color ?", "red"),
            "dialogue 'x': its picture 9.png is not among those of the batch",
        ),
    ],
)
def test_what_cannot_be_asked_is_named(dialogue: Dialogue, message: str) -> None:
    with pytest.raises(DataError) as error:
        tiny_vqa().collate([*dialogues(), dialogue], pictures())
    assert str(error.value) == message


# ------------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_do_not_hang_on_the_batch_the_mode_or_the_answer_that_is_known(beams: int) -> None:
    answering = tiny_vqa(dropout=0.3)
    together = answering.answer(dialogues(), pictures(), beams=beams)
    assert answering.model.training  # as it was
    unknown = [replace(d, turns=(replace(d.turns[0], answer=""),), answers=()) for d in dialogues()]
    assert [answering.answer([d], pictures(), beams=beams)[0] for d in unknown] == together
    texts = [said.text for said in together]
    assert len(set(texts)) > 1
    assert not any("<" in text or text != text.strip() for text in texts)


def test_likelihood_is_the_sum_of_log_probabilities_and_of_all_short_answers_at_most_one() -> None:
    answering = tiny_vqa(dropout=0.3)
    spoken = dialogues()
    sums, tokens = answering.likelihood(spoken, pictures())
    assert (sums.dtype, tokens.dtype) == (torch.float32, torch.int64)
    assert tokens.tolist() == [len(d.turns[0].answer.split()) + 1 for d in spoken]
    answering.model.eval()
    for dialogue, total, count in zip(spoken, sums.tolist(), tokens.tolist(), strict=True):
        inputs = answering.collate([dialogue], pictures()).inputs
        assert -answering.model(**inputs).loss.item() * count == pytest.approx(total, abs=1e-5)
    one_word = [asked(word, "0.png", "what color ?", word) for word in answering.answer_tokenizer.get_vocab()]
    every = answering.likelihood([d for d in one_word if d.name != "<|endoftext|>"], pictures())[0]
    assert 0 < every.exp().sum() < 1


def test_features_are_the_pictures() -> None:
    answering = tiny_vqa(dropout=0.3)
    seen = pictures()
    assert seen.pixels_NCHW is not None
    features = answering.picture_features(seen.pixels_NCHW)
    assert (features.shape, features.dtype, features.requires_grad) == ((3, 5, 16), torch.float32, False)
    kept = Pictures(seen.keys, features_NPF=features)
    assert answering.answer(dialogues(), kept) == answering.answer(dialogues(), seen)
    torch.testing.assert_close(
        answering.likelihood(dialogues(), kept)[0], answering.likelihood(dialogues(), seen)[0]
    )


# ---------------------------------------------------------------------------------------------------------------- memory


class Counted:
    """How many questions passed the question tower."""

    def __init__(self, text: nn.Module) -> None:
        self.rows = 0
        text.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module: nn.Module, args: object, kwargs: dict[str, torch.Tensor], output: object) -> None:
        self.rows += len(kwargs["input_ids"])


def locked(answering: VqaAnswering) -> VqaAnswering:
    answering.model.text.requires_grad_(False)
    answering.hold_locked_parts()
    return answering


def test_a_locked_question_tower_sees_each_question_once_and_nothing_changes() -> None:
    plain, held = tiny_vqa(dropout=0.3), locked(tiny_vqa(dropout=0.3))
    assert held.remember_questions
    assert not held.model.text.training
    assert held.model.decoder.training
    plain.model.eval()
    held.model.eval()
    counted = Counted(held.model.text)
    for count in (2, 6, 6):  # a part, more, all again
        spoken = dialogues(count)
        with_memory = held.collate(spoken, pictures()).inputs
        assert "input_ids" not in with_memory
        loss = held.model(**with_memory).loss
        torch.testing.assert_close(
            loss, plain.model(**plain.collate(spoken, pictures()).inputs).loss, atol=1e-6, rtol=0
        )
    assert counted.rows == 4  # distinct questions
    assert held.answer(dialogues(), pictures()) == plain.answer(dialogues(), pictures())


def test_memory_is_bounded_and_what_does_not_fit_is_made_anew() -> None:
    held = locked(tiny_vqa())
    room = sum(len(held._ids_of(d.question)) for d in dialogues(2)) * 16 * 4  # tokens · width · bytes
    held.question_memory_mib = room / 2**20
    counted = Counted(held.model.text)
    first = held.collate(dialogues(), pictures()).inputs["question_features"]
    assert counted.rows == 4
    assert torch.allclose(held.collate(dialogues(), pictures()).inputs["question_features"], first)
    assert counted.rows == 4 + 2


def test_a_question_tower_that_learns_is_not_remembered() -> None:
    answering = tiny_vqa()
    answering.hold_locked_parts()
    assert not answering.remember_questions
    answering.remember_questions = True
    assert "input_ids" in answering.collate(dialogues(), pictures()).inputs


# -------------------------------------------------------------------------------------------------------------- on the disk


@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_a_saved_model_is_the_same_model(tmp_path: Path, fusion: str) -> None:
    answering = tiny_vqa(fusion=fusion)  # type: ignore[arg-type]
    # as the training hands them over: buffers too, shared weights once
    weights = dict(answering.model.named_parameters()) | dict(answering.model.named_buffers())
    answering.save({name: value.detach() for name, value in weights.items()}, tmp_path / "model")
    loaded = load_answering(str(tmp_path / "model"), torch.device("cpu"))
    assert isinstance(loaded, VqaAnswering)
    assert not loaded.model.training
    assert loaded.image == answering.image
    answering.model.eval()
    inputs = loaded.collate(dialogues(), pictures()).inputs
    assert torch.equal(loaded.model(**inputs).logits, answering.model(**inputs).logits)
    assert loaded.answer(dialogues(), pictures()) == answering.answer(dialogues(), pictures())
    assert loaded.model.decoder.lm_head.weight is loaded.model.decoder.transformer.wte.weight
    assert not any("lm_head" in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    assert loaded.answer_tokenizer.get_vocab() == answering.answer_tokenizer.get_vocab()
    assert loaded.question_tokenizer.get_vocab() == answering.question_tokenizer.get_vocab()
    prepared = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert (prepared["crop_size"]["height"], prepared["image_mean"]) == (16, [0.5, 0.5, 0.5])
    assert isinstance(AutoModel.from_pretrained(tmp_path / "model"), VqaModel)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == question_tokenizer().get_vocab()


def test_an_empty_copy_becomes_the_model_with_its_weights() -> None:
    answering = tiny_vqa(fusion="mean")
    copy = answering.empty_copy()
    assert copy.model.config.to_dict() == answering.model.config.to_dict()
    weights = answering.plain_weights(dict(answering.model.named_parameters()))
    copy.model.load_state_dict(weights, strict=False)
    assert copy.answer(dialogues(), pictures()) == answering.answer(dialogues(), pictures())
    with torch.no_grad():
        copy.model.decoder.transformer.wte.weight.zero_()
    assert answering.model.decoder.transformer.wte.weight.any()


def test_weights_that_are_not_all_there_are_not_saved(tmp_path: Path) -> None:
    answering = tiny_vqa()
    weights = answering.model.state_dict()
    del weights["text_projection.bias"]
    with pytest.raises(CheckpointError) as error:
        answering.save(weights, tmp_path)
    assert str(error.value) == f"{tmp_path}: the weights to save lack text_projection.bias (1 in all)"


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    tiny_vqa_config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: cannot be loaded: "):
        load_vqa(tmp_path, torch.device("cpu"))
