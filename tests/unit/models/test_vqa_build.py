"""Building a VQA model: pretrained parts, tokenizers that fit, one dropout for all, checkpoints, and what cannot be built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertModel, GPT2Config, GPT2LMHeadModel, ViTModel

from fmray.config.answers import LanguageModelConfig, VqaModelConfig
from fmray.config.schema import ImageConfig, TowerConfig
from fmray.errors import ConfigError
from fmray.models.answer_tokenizer import learn_tokenizer
from fmray.models.answering import build_answering
from fmray.models.towers import DROPOUT_KEYS
from fmray.models.vqa_answering import VqaAnswering, build_vqa
from tests.tiny_vqa import (
    answer_tokenizer,
    dialogues,
    pictures,
    question_tokenizer,
    tiny_vqa,
    tiny_vqa_config,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A picture tower, a question tower and a GPT-2 without cross-attention, saved as the hub's are."""
    torch.manual_seed(3)
    whole, root = tiny_vqa_config(dropout=0.1), tmp_path_factory.mktemp("towers")
    ViTModel(whole.vision_config, add_pooling_layer=False).save_pretrained(root / "vision")
    BertModel(whole.text_config, add_pooling_layer=False).save_pretrained(root / "text")
    question_tokenizer().save_pretrained(root / "text")
    keys = {**whole.decoder_config.to_dict(), "add_cross_attention": False}
    GPT2LMHeadModel(GPT2Config(**keys)).save_pretrained(root / "decoder")
    answer_tokenizer().save_pretrained(root / "decoder")
    return {name: str(root / name) for name in ("vision", "text", "decoder")}


def wanted(folders: dict[str, str], **changes: object) -> VqaModelConfig:
    keys = {
        "vision": TowerConfig(source=folders["vision"]),
        "text": TowerConfig(source=folders["text"]),
        "decoder": LanguageModelConfig(source=folders["decoder"]),
        "image": ImageConfig(size=16),
        "max_question_tokens": 12,
        "max_answer_tokens": 5,
    }
    return VqaModelConfig.model_validate(keys | changes)


def test_pretrained_parts_keep_their_weights_and_cross_attention_starts_fresh(
    folders: dict[str, str],
) -> None:
    answering = build_answering(wanted(folders))
    assert isinstance(answering, VqaAnswering)
    model = answering.model
    kinds = {"vision": ViTModel, "text": BertModel, "decoder": GPT2LMHeadModel}
    for name, kind in kinds.items():
        saved, own = (
            kind.from_pretrained(folders[name]).state_dict(),
            getattr(model, name).state_dict(),
        )
        theirs = {key for key in saved if "pooler" not in key}  # transformers adds a fresh one
        assert theirs <= own.keys()
        assert all(torch.equal(saved[key], own[key]) for key in theirs)
    cross = model.decoder.transformer.h[0].crossattention
    assert cross.q_attn.weight.std().item() == pytest.approx(0.02, rel=0.2)  # GPT-2's own start
    assert not cross.q_attn.bias.any()
    width = model.vision_projection.in_features
    assert model.vision_projection.weight.std().item() == pytest.approx(width**-0.5, rel=0.2)
    inputs = answering.collate(dialogues(), pictures()).inputs
    model(**inputs).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert (model.config.max_question_tokens, model.config.max_answer_tokens) == (12, 5)


def test_the_questions_states_come_from_the_layer_that_is_asked_for(
    folders: dict[str, str], tmp_path: Path
) -> None:
    answering = build_vqa(wanted(folders, text_layer=-2))
    model, inputs = answering.model.eval(), answering.collate(dialogues(), pictures()).inputs
    asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    layers = model.text(**asked, output_hidden_states=True).hidden_states
    assert torch.allclose(model.question_tokens(**asked), layers[-2], atol=1e-6)
    assert not torch.allclose(model.question_tokens(**asked), layers[-1], atol=1e-2)
    model(**inputs).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    top = [
        p.grad.abs().sum()
        for name, p in model.named_parameters()
        if f"text.encoder.layer.{len(layers) - 2}" in name
    ]
    assert top
    assert not any(top)  # nobody reads it
    answering.save(model.state_dict(), tmp_path)
    again = build_vqa(VqaModelConfig(checkpoint=str(tmp_path)))
    assert again.answer(dialogues(), pictures()) == answering.answer(dialogues(), pictures())
    assert again.model.config.text_layer == -2
    with pytest.raises(ConfigError) as error:
        build_vqa(wanted(folders, text_layer=-9))
    count = len(layers) - 1
    assert str(error.value) == (
        f"model.text_layer=-9: the question's tower has {count} layers and its embeddings: -{count + 1} at the lowest"
    )


def test_a_decoder_from_scratch_takes_its_tokenizers_vocabulary(folders: dict[str, str]) -> None:
    shape = {"n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 16}
    decoder = {
        "source": "arch:gpt2",
        "pretrained": False,
        "overrides": shape,
        "tokenizer": folders["decoder"],
    }
    answering = build_vqa(wanted(folders, decoder=decoder))
    assert answering.model.decoder.lm_head.out_features == len(answer_tokenizer())
    assert (answering.model.config.start_id, answering.model.config.end_id) == (0, 0)
    larger = build_vqa(wanted(folders, decoder={**decoder, "overrides": {**shape, "vocab_size": 64}}))
    assert larger.model.decoder.lm_head.out_features == 64
    assert larger.answer(dialogues(), pictures())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_dropout_for_all_three(folders: dict[str, str], tmp_path: Path, dropout: float) -> None:
    built = build_vqa(wanted(folders, dropout=dropout))
    as_they_say = build_vqa(wanted(folders))
    as_they_say.save(as_they_say.model.state_dict(), tmp_path)
    again = build_vqa(VqaModelConfig(checkpoint=str(tmp_path), dropout=dropout))
    for model, rate in ((built.model, dropout), (again.model, dropout), (as_they_say.model, 0.1)):
        for part in ("vision", "text", "decoder"):
            found = [m.p for m in getattr(model, part).modules() if isinstance(m, nn.Dropout)]
            assert found
            assert set(found) == {rate}
            config = getattr(model.config, f"{part}_config")
            assert {getattr(config, key) for key in DROPOUT_KEYS if getattr(config, key, None)} <= {rate}


def test_a_checkpoint_goes_on_as_it_was_saved(tmp_path: Path) -> None:
    answering = tiny_vqa()
    answering.save(answering.model.state_dict(), tmp_path)
    again = build_vqa(VqaModelConfig(checkpoint=str(tmp_path), max_answer_tokens=3))
    assert again.model.config.max_answer_tokens == 5
    assert again.answer(dialogues(), pictures()) == answering.answer(dialogues(), pictures())


def test_impossible_models_are_named(folders: dict[str, str], tmp_path: Path) -> None:
    large = {"source": folders["text"]}
    few = {"vocab_size": 5}
    scratch = {"source": "arch:gpt2", "pretrained": False}
    llama = {"source": "arch:llama", "pretrained": False}
    bare = tmp_path / "bare"
    GPT2Config(n_layer=1).save_pretrained(bare)
    cases: list[tuple[dict[str, object], str]] = [
        (
            {"text": {**large, "pretrained": False, "overrides": few}},
            f"model.text.source='{folders['text']}': towers of different tokenizers: {folders['text']} has a token "
            "number 20, but its bert model only 5 embeddings",
        ),
        (
            {"decoder": {**scratch, "tokenizer": folders["decoder"], "overrides": few}},
            f"model.decoder.tokenizer='{folders['decoder']}': towers of different tokenizers: {folders['decoder']} has a "
            "token number 12, but arch:gpt2 only 5 embeddings",
        ),
        (
            {"decoder": {"source": folders["decoder"], "tokenizer": folders["text"]}},
            f"model.decoder.tokenizer='{folders['text']}': has no end-of-text token, so an answer never ends",
        ),
        (
            {"decoder": scratch},
            "model.decoder.tokenizer=None: arch:gpt2 has no tokenizer: "
            "name one, as asset:gpt2_tokenizer, or answers to learn one",
        ),
        (
            {"decoder": llama},
            "model.decoder.source='arch:llama': is a llama model: the VQA model's decoder is GPT-2, "
            "which takes cross-attention",
        ),
        (
            {"image": {"size": 32}},
            f"model.image.size=32: {folders['vision']} takes 16: set this, or model.vision.overrides.image_size from scratch",
        ),
        (
            {"max_question_tokens": 17},
            "model.max_question_tokens=17: the bert model reads 16 tokens at most",
        ),
        ({"max_answer_tokens": 17}, "model.max_answer_tokens=17: the gpt2 model reads 16 tokens at most"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError) as error:
            build_vqa(wanted(folders, **changes))
        assert str(error.value) == message
    with pytest.raises(
        ConfigError, match=r"^model\.decoder\.source=.*bare.*: (has no tokenizer|cannot be loaded)"
    ):
        build_vqa(wanted(folders, decoder={"source": str(bare)}))


def test_a_decoder_that_lacks_weights_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    keys = {**json.loads(Path(folders["decoder"], "config.json").read_text()), "n_layer": 3}
    deeper = LanguageModelConfig(source=folders["decoder"], overrides={"n_layer": keys["n_layer"]})
    with pytest.raises(ConfigError, match=r"does not hold the decoder's weights: transformer\.h\.2\."):
        build_vqa(wanted(folders, decoder=deeper))


def test_a_tokenizer_learned_from_answers_has_frequent_ones_whole_and_spells_the_rest() -> None:
    said = ["red"] * 9 + ["rectangle"] * 5 + ["light blue"] * 3
    tokenizer, again = learn_tokenizer(said), learn_tokenizer(said)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert [len(tokenizer(text)["input_ids"]) for text in ("red", "rectangle")] == [1, 1]
    for text in ("light blue", "초록색", "never said 7!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id


def test_a_standardized_projection_begins_at_mean_0_and_deviation_1() -> None:
    answering = tiny_vqa()
    asked = ["what color is it?", "is it a circle?", "is there a red shape?"]
    before = answering.model.text_projection.weight.clone()
    ids = [answering.question_tokenizer(text)["input_ids"] for text in asked]
    rows = [
        answering.model.question_tokens(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))[0]
        for row in ids
    ]
    states_NF = torch.cat(rows).detach()
    answering.standardize(asked)
    ours = answering.model.text_projection(states_NF)
    normal = (states_NF - states_NF.mean(0)) / states_NF.std(0)
    torch.testing.assert_close(ours, normal @ before.T, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="no training questions"):
        answering.standardize([])
