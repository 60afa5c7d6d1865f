"""The multimodal LLM as a whole: what it answers, how likely an answer is, what it is built from, what is saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, GenerationConfig

from fmray.errors import CheckpointError, ConfigError, DataError
from fmray.models.answering import Said, load_answering
from fmray.models.decoding.any import AnyCausalDecoder, AnySeq2SeqDecoder
from fmray.models.decoding.generate import make_decoder
from fmray.models.language import open_language_model
from fmray.models.mllm import Mllm, MllmConfig
from fmray.models.mllm_answering import MllmAnswering
from fmray.types import Dialogue, Pictures, Turn
from tests.stories import tiny_t5
from tests.tiny_mllm import about, pictures, some_dialogues, tiny_mllm

MODELS = pytest.mark.parametrize("language", ["llama", "gpt2"])
FUSIONS = pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
PAIR = Dialogue("pair", ("0.png", "1.png"), (Turn(("", " beside ", "which?"), ""),))
CPU = torch.device("cpu")


@torch.no_grad()
def said_slowly(answering: MllmAnswering, dialogue: Dialogue, given: Pictures) -> list[int]:
    """Greedy by whole forward passes, without any cache: the prompt of a training rendering grows by its likeliest token."""
    model, said = answering.model, []
    spans = answering.renderer.spans(dialogue, answer=False)
    for _ in range(model.config.max_answer_tokens):
        prompt = [token for span in spans for token in span.ids]
        inputs: dict[str, Any] = {"input_ids": torch.tensor([[*prompt, *said]])}
        keys = [span.picture for span in spans if span.picture is not None]
        if keys:
            rows = given.rows(keys)
            inputs["pixel_values"] = given.pixels_NCHW[rows]  # type: ignore[index]
            if model.config.fusion == "cross_attention":
                starts, place = [], 0
                for span in spans:
                    starts += [place] if span.picture is not None else []
                    place += len(span.ids)
                columns = torch.arange(inputs["input_ids"].shape[1])
                order = torch.arange(len(keys))[None]
                inputs |= {"memory_pictures": order, "memory_group": order * 0, "memory_place": order}
                inputs["seen"] = sum((columns >= start).long() for start in starts)[None]
        token = int(model(**inputs).logits[0, -1].argmax())
        if token == answering.renderer.end_id:
            break
        said.append(token)
    return said


def slowly(answering: MllmAnswering, dialogue: Dialogue, given: Pictures) -> str:
    return answering.renderer.text(said_slowly(answering, dialogue, given))


def texts(answers: Sequence[Said]) -> list[str]:
    return [said.text for said in answers]


@MODELS
@FUSIONS
def test_answers_are_those_of_whole_passes_alone_and_together(language: str, fusion: str) -> None:
    answering, given = tiny_mllm(language=language, fusion=fusion, seed=3), pictures(2)
    dialogues = [*some_dialogues(), PAIR]
    answering.model.train()  # no dropout in these, but the mode must come back
    together = answering.answer(dialogues, given)
    assert answering.model.training
    answering.model.eval()
    assert together == [answering.answer([dialogue], given)[0] for dialogue in dialogues]
    assert texts(together) == [slowly(answering, dialogue, given) for dialogue in dialogues]
    assert len(set(texts(together))) > 1
    assert answering.answer(dialogues[::-1], given) == together[::-1]


@MODELS
@FUSIONS
def test_answers_that_end_early_leave_the_others_alone(language: str, fusion: str) -> None:
    """Finished rows leave the batch: caches and pictures of the others must stay with them."""
    answering, given = tiny_mllm(language=language, fusion=fusion, seed=3), pictures(2)
    dialogues = [*some_dialogues(), PAIR]
    endless = [said_slowly(answering, dialogue, given) for dialogue in dialogues]
    for end in sorted({ids[1] for ids in endless})[:3]:
        answering.renderer.end_id = end
        short = [ids[: ids.index(end)] if end in ids else ids for ids in endless]
        assert len({len(ids) for ids in short}) > 1
        assert texts(answering.answer(dialogues, given)) == [answering.renderer.text(ids) for ids in short]


@MODELS
@FUSIONS
def test_the_answer_is_not_read(language: str, fusion: str) -> None:
    answering, given = tiny_mllm(language=language, fusion=fusion), pictures(2)
    blank = [about(0, 1, answer=""), about(1, 2, answer="")]
    told = [about(0, 1), about(1, 2, answer="<|im_end|> anything")]
    assert answering.answer(blank, given) == answering.answer(told, given)


def test_beams_are_transformers_own() -> None:
    answering, given = tiny_mllm(seed=5), pictures(2)
    dialogues = some_dialogues()
    prompts = [answering.renderer.spans(d, answer=False) for d in dialogues]
    theirs = []
    for dialogue, spans in zip(dialogues, prompts, strict=True):
        ids = torch.tensor([[token for span in spans for token in span.ids]])
        rows = given.rows([span.picture for span in spans if span.picture is not None])
        blocks = answering.model.projected(given.pixels_NCHW[rows]) if rows else None  # type: ignore[index]
        words = answering.model.prompt_words(ids, blocks)
        settings = GenerationConfig(
            max_new_tokens=8, num_beams=3, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        made = answering.model.language.generate(inputs_embeds=words.detach(), generation_config=settings)
        said = made[0].tolist()
        theirs.append(answering.renderer.text(said[: said.index(2)] if 2 in said else said))
        assert dialogue
    assert texts(answering.answer(dialogues, given, beams=3)) == theirs


@pytest.mark.parametrize("beams", [1, 3])
def test_transformers_generate_says_the_same(beams: int) -> None:
    answering, given = tiny_mllm(seed=3), pictures(2)
    dialogues = [about(0, 0), about(1, 0)]
    prompts = [answering.renderer.spans(d, answer=False) for d in dialogues]
    ids = torch.tensor([[token for span in spans for token in span.ids] for spans in prompts])
    settings = GenerationConfig(
        max_new_tokens=8, num_beams=beams, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    asked = {"input_ids": ids, "pixel_values": given.pixels_NCHW, "attention_mask": torch.ones_like(ids)}
    made = answering.model.generate(**asked, generation_config=settings)[:, ids.shape[1] :].tolist()
    said = [answering.renderer.text(row[: row.index(2)] if 2 in row else row) for row in made]
    assert said == texts(answering.answer(dialogues, given, beams=beams))
    with pytest.raises(
        ConfigError, match=r"^fusion='cross_attention': generate\(\) knows no places of pictures"
    ):
        tiny_mllm(fusion="cross_attention").model.generate(**asked, generation_config=settings)


@MODELS
@FUSIONS
def test_beams_alone_and_together(language: str, fusion: str) -> None:
    answering, given = tiny_mllm(language=language, fusion=fusion, max_answer_tokens=3), pictures(2)
    dialogues = [*some_dialogues(), PAIR]
    alone = [answering.answer([dialogue], given, beams=4)[0] for dialogue in dialogues]
    assert answering.answer(dialogues, given, beams=4) == alone


def test_the_decoder_follows_the_weights() -> None:
    """It holds copies: a step of the optimizer, and a write past autograd's count of writes, are both seen."""
    answering, given = tiny_mllm(seed=3), pictures(1)
    dialogue = about(0, 0)
    for write in (lambda p: p.data.neg_(), lambda p: p.copy_(p * -1)):
        answering.answer([dialogue], given)
        with torch.no_grad():
            write(answering.model.language.model.layers[0].mlp.down_proj.weight)
        assert answering.answer([dialogue], given)[0].text == slowly(answering, dialogue, given)


@MODELS
@FUSIONS
def test_likelihood_is_the_sum_over_the_last_answer_and_its_end(language: str, fusion: str) -> None:
    answering, given = tiny_mllm(language=language, fusion=fusion), pictures(2)
    dialogues = some_dialogues()
    logp, tokens = answering.likelihood(dialogues, given)
    for number, dialogue in enumerate(dialogues):
        inputs = answering.collate([dialogue], given).inputs
        labels = inputs.pop("labels")[0]
        with torch.no_grad():
            scores = answering.model(**inputs).logits[0].log_softmax(-1)
        answer = len(answering.tokenizer.encode(dialogue.turns[-1].answer, add_special_tokens=False)) + 1
        places = (labels != -100).nonzero()[-answer:, 0].tolist()
        wanted = sum(scores[place - 1, labels[place]] for place in places)
        torch.testing.assert_close(logp[number], wanted, atol=1e-4, rtol=1e-5)
        assert tokens[number] == answer


def test_many_candidates_share_a_picture() -> None:
    answering, given = tiny_mllm(), pictures(1)
    candidates = [Dialogue(str(n), ("0.png",), (Turn(("", "what?"), f"a {n} circle"),)) for n in range(120)]
    logp, _ = answering.likelihood(candidates, given)
    [alone] = answering.likelihood(candidates[77:78], given)[0]
    torch.testing.assert_close(logp[77], alone, atol=1e-4, rtol=0)
    with pytest.raises(
        DataError, match=r"^dialogue 'None/0': has no last answer within model.max_tokens to score$"
    ):
        answering.likelihood([about(None, 0, answer="")], given)


def test_what_cannot_be_learned_from() -> None:
    answering, given = tiny_mllm(max_tokens=40), pictures(1)
    for dialogue, said in (
        (about(0, 0, answer=""), "has no answer to learn from"),
        (about(7, 0), "its picture '7.png' was not given"),
        (Dialogue("0/0", (), about(0, 0).turns), "has 0 pictures for 1 places in its questions"),
    ):
        with pytest.raises(DataError) as caught:
            tiny_mllm().collate([dialogue], given)
        assert str(caught.value) == f"dialogue '{dialogue.name}': {said}"
    with pytest.raises(
        DataError, match=r"^dialogue '0/0': its first turn takes \d+ tokens, the limit is 40; raise"
    ):
        answering.collate([about(0, 0)], given)


# ----------------------------------------------------------------------------------------------------------------- on disk


@FUSIONS
@pytest.mark.parametrize("language", ["llama", "gpt2"])
@pytest.mark.parametrize("vision", ["vit", "mobilenet_v2"])
def test_a_saved_model_is_the_model(fusion: str, language: str, vision: str, tmp_path: Path) -> None:
    answering = tiny_mllm(fusion=fusion, language=language, vision=vision)
    given = pictures(2, size=answering.image.size)
    answering.save(answering.model.state_dict(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any(name.endswith("lm_head.weight") for name in stored)  # tied: once
    loaded = load_answering(str(tmp_path), CPU)
    assert isinstance(loaded, MllmAnswering)
    mine, theirs = answering.model.state_dict(), loaded.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    dialogues = some_dialogues()
    assert loaded.answer(dialogues, given) == answering.answer(dialogues, given)
    batch = answering.collate(dialogues, given).inputs
    assert torch.equal(loaded.model(**batch).loss, answering.model(**batch).loss)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MllmConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), Mllm)
    assert loaded.tokenizer.chat_template == answering.tokenizer.chat_template
    kept = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert kept["crop_size"]["height"] == answering.image.size


def test_folded_batch_norms_are_found_again(tmp_path: Path) -> None:
    answering = tiny_mllm(vision="mobilenet_v2", folded_batch_norm=True)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in answering.model.vision.modules())
    answering.save(answering.model.state_dict(), tmp_path)
    loaded = load_answering(str(tmp_path), CPU)
    batch = answering.collate(some_dialogues(), pictures(2, size=64)).inputs
    assert torch.equal(loaded.model(**batch).loss, answering.model(**batch).loss)


def test_saving_wants_all_weights_and_loading_a_whole_folder(tmp_path: Path) -> None:
    answering = tiny_mllm()
    weights = answering.model.state_dict()
    del weights["projector.0.bias"]
    with pytest.raises(CheckpointError, match=r"the weights to save lack projector.0.bias \(1 in all\)$"):
        answering.save(weights, tmp_path / "a")
    answering.save(answering.model.state_dict(), tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_answering(str(tmp_path / "b"), CPU)


@MODELS
def test_an_empty_copy_takes_the_weights(language: str) -> None:
    answering, given = tiny_mllm(language=language), pictures(2)
    twin = answering.empty_copy()
    twin.model.load_state_dict(dict(answering.model.named_parameters()), strict=False)
    twin.model.eval()
    assert twin.model.language.lm_head.weight is twin.model.get_input_embeddings().weight
    batch = answering.collate(some_dialogues(), given).inputs
    assert torch.equal(twin.model(**batch).loss, answering.model(**batch).loss)
    assert not any(p.is_meta for p in twin.model.parameters())


@MODELS
def test_every_decoder_reads_embeddings_in_place_of_tokens(language: str) -> None:
    """The hand-written steps and the module's own forward pass, padded on either side, against the tokens themselves."""
    model = tiny_mllm(language=language).model.language
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 320, (2, 7), generator=draw)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    words = model.get_input_embeddings()(ids).detach()
    rows, nonsense = torch.tensor([0, 1, 1]), torch.full_like(ids, 10_000)
    for decoder in (make_decoder(model), AnyCausalDecoder(model, "fp32")):
        with torch.inference_mode():
            by_ids = decoder.start(ids, mask, rows, 4)
            by_words = decoder.start(nonsense, mask, rows, 4, words)
            torch.testing.assert_close(by_words, by_ids, atol=1e-5, rtol=0)
            after = decoder.step(torch.tensor([5, 6, 7]))
            decoder.start(ids, mask, rows, 4)
            torch.testing.assert_close(decoder.step(torch.tensor([5, 6, 7])), after, atol=1e-5, rtol=0)
    assert torch.equal(words, model.get_input_embeddings()(ids))  # nobody wrote into them


def test_an_encoder_decoder_reads_tokens_alone(tmp_path: Path) -> None:
    model = open_language_model(str(tiny_t5(tmp_path)), "policy.source").model
    ids = torch.ones(1, 3, dtype=torch.int64)
    for decoder in (make_decoder(model), AnySeq2SeqDecoder(model, "fp32")):
        with pytest.raises(
            ConfigError, match=r"^words_NPD=\(1, 3, 32\): an encoder-decoder reads tokens alone$"
        ):
            decoder.start(ids, ids, torch.tensor([0]), 4, torch.zeros(1, 3, 32))
