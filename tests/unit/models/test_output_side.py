"""Answers that are pictures: the decision and the tokens behind it, the projector's loss by hand, folders, learning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fmray.config.answers import MllmModelConfig, OutputConfig
from fmray.errors import CheckpointError, ConfigError, DataError
from fmray.models.answering import load_answering
from fmray.models.decoding.generate import make_decoder
from fmray.models.generator import NearestPicture
from fmray.models.language import response_logits
from fmray.models.mllm_answering import MllmAnswering, build_mllm
from fmray.models.mllm_output import add_output
from fmray.models.output_side import OutputSide, reply_loss
from fmray.objectives.contrastive import infonce
from fmray.types import Dialogue, Pictures, Turn
from tests.drawing import WIDTH, Targets, drawing, request
from tests.tiny_mllm import mllm_tokenizer, pictures, some_dialogues, tiny_mllm
from tests.unit.models.test_mllm_answering import CPU

NOTHING = Pictures(())
LANGUAGES = pytest.mark.parametrize("language", ["llama", "gpt2"])


def decide(answering: MllmAnswering, monkeypatch: pytest.MonkeyPatch, before: Sequence[int] = ()) -> None:
    """From now on greedy search chooses some words and then the decision, whatever was asked."""
    chosen = [*before, answering.renderer.routing_ids[0], answering.renderer.end_id]
    monkeypatch.setattr(answering, "_greedy", lambda ids_BP, *_: [chosen] * len(ids_BP))


# ---------------------------------------------------------------------------------------------------------- routing tokens


def test_the_decision_is_a_token_to_spare_else_a_new_one(tmp_path: Path) -> None:
    answering = drawing(tmp_path)
    config = answering.model.config
    assert config.text_config.vocab_size == 321
    assert config.output["routing_ids"] == [
        320,
        322,
        323,
        324,
    ]  # behind the vocabulary and the picture's placeholder
    assert config.image_token_id == 321
    assert answering.tokenizer.convert_tokens_to_ids("<|picture|>") == 320
    plain = tiny_mllm()
    plain.tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|one|>", "<|two|>"]}, replace_extra_special_tokens=False
    )
    held = plain.tokenizer
    for name in ("_extra_special_tokens", "_additional_special_tokens"):
        if hasattr(held, name):
            setattr(held, name, [])
    add_output(plain.model, held, OutputConfig(clip=str(tmp_path / "clip")))
    assert plain.model.config.output["routing_ids"][0] == 321


def test_only_the_decision_and_the_end_are_learned(tmp_path: Path) -> None:
    answering = drawing(tmp_path)
    spans = answering.renderer.spans(request("a cat", key="1"))
    ids = [token for span in spans for token in span.ids]
    learned = [token for span in spans if span.learns for token in span.ids]
    first, *rest = answering.renderer.routing_ids
    assert learned == [first, answering.renderer.end_id]
    start = ids.index(first)
    assert ids[start + 1 : start + 4] == rest
    typed = request("<|picture|>")
    assert [t for span in answering.renderer.spans(typed) for t in span.ids].count(first) == 1
    said = Dialogue("d", (), (Turn(("draw",), "here: ", picture="a cat"),))
    told = [token for span in answering.renderer.spans(said) if span.learns for token in span.ids]
    assert told[-2:] == learned
    assert answering.renderer.text(told) == "here:"


def test_a_model_of_words_says_what_it_lacks() -> None:
    with pytest.raises(DataError) as error:
        tiny_mllm().collate([request("a cat")], NOTHING)
    assert str(error.value) == (
        "dialogue 'a cat ': its answer is a picture, but the model says words alone; set model.output"
    )


# -------------------------------------------------------------------------------------------------------------- the decision


def decisive(answering: MllmAnswering) -> MllmAnswering:
    """With a decision that is neither never nor always the likeliest."""
    draw = torch.Generator().manual_seed(5)
    decision = answering.model.output.decision
    decision.weight.data.normal_(std=2.0, generator=draw)
    decision.bias.data.fill_(0.5)
    return answering


@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
@pytest.mark.parametrize("language", ["llama", "gpt2", "mistral"])
def test_the_decision_has_an_output_row_of_its_own_everywhere(
    tmp_path: Path, language: str, fusion: str
) -> None:
    """Forward, the decoders and a saved and loaded model give one set of logits; only the decision's column is another."""
    answering = decisive(drawing(tmp_path, language=language, fusion=fusion))
    model, routing = answering.model, answering.renderer.routing_ids[0]
    ids_BP = torch.tensor([[5, 9, 31, 7], [8, 3, 12, 40]])
    mask_BP, rows = torch.ones_like(ids_BP), torch.arange(2)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([ids_BP, ids_BP[:, :1]], dim=1))
        states = model.body(input_ids=ids_BP).last_hidden_state
        by_hand = states[:, -1] @ model.output.decision.weight[0] + model.output.decision.bias
        bare = model.get_output_embeddings()(states[:, -1])
        decoder = make_decoder(model)
        first, second = decoder.start(ids_BP, mask_BP, rows, 2), decoder.step(ids_BP[:, 0])
    assert torch.allclose(first, whole.logits[:, 3], atol=1e-4)
    assert torch.allclose(second, whole.logits[:, 4], atol=1e-4)
    assert torch.allclose(first[:, routing], by_hand, atol=1e-4)
    others = torch.arange(first.shape[1]) != routing
    assert torch.allclose(first[:, others], bare[:, others], atol=1e-4)
    assert not torch.allclose(first[:, routing], bare[:, routing], atol=0.1)
    assert torch.allclose(response_logits(model, states[:, -1]), first, atol=1e-4)
    answering.save(model.state_dict(), tmp_path / "model")
    loaded = load_answering(str(tmp_path / "model"), CPU)
    with torch.no_grad():
        again = loaded.model(input_ids=ids_BP).logits[:, -1]
    assert torch.allclose(again, first, atol=1e-4)


class HandedOn(torch.autograd.Function):
    """What DeepSpeed does to a module's output under ZeRO-3, to hear of its backward pass."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def test_the_decision_learns_behind_hooks_as_without(tmp_path: Path) -> None:
    grads = []
    for hooked in (False, True):
        answering = decisive(drawing(tmp_path))
        answering.reply_targets = Targets()
        model = answering.model
        if hooked:
            for module in (model.get_output_embeddings(), model.output.decision):
                module.register_forward_hook(lambda _, __, output: HandedOn.apply(output))
        batch = answering.collate([request("a cat"), request("a dog", words="no")], NOTHING)
        model(**batch.inputs, loss_only=True).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert grads[0]["output.decision.weight"].abs().sum() > 0


def test_greedy_beams_and_likelihood_know_the_decision(tmp_path: Path) -> None:
    answering = decisive(drawing(tmp_path))
    decision, asked = answering.model.output.decision, [request("a cat"), request("it")]
    answering.answer(asked, NOTHING)
    before = answering.likelihood(asked, NOTHING)[0]
    decision.bias.data.fill_(60.0)  # the decoder's copy must be renewed
    for beams in (1, 2):
        assert all(one.embedding_D is not None for one in answering.answer(asked, NOTHING, beams=beams))
    decision.bias.data.fill_(-60.0)
    for beams in (1, 2):
        assert all(one.embedding_D is None for one in answering.answer(asked, NOTHING, beams=beams))
    assert bool((answering.likelihood(asked, NOTHING)[0] < before - 40).all())


def test_an_adapter_alone_could_not_learn_to_decide(tmp_path: Path) -> None:
    """Beside an adapter the output matrix is frozen; the decision's row is not, and it is saved with the output part."""
    config = MllmModelConfig.model_validate(
        {"checkpoint": _words(tmp_path), "max_tokens": 64, "lora": {"rank": 2}}
    )
    config = config.replace(output=OutputConfig(clip=str(tmp_path / "clip"), hidden=16))
    answering = build_mllm(config)
    answering.reply_targets = Targets()
    learning = {name for name, p in answering.model.named_parameters() if p.requires_grad}
    assert {"output.decision.weight", "output.decision.bias"} <= learning
    assert not any("lm_head" in name or "embed_tokens" in name for name in learning)
    asked = [request(thing) for thing in ("cat", "dog")]
    batch = answering.collate([*asked, *(request(t, words="no") for t in ("cat", "dog"))], NOTHING)
    optimizer = torch.optim.AdamW([p for p in answering.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        answering.model(**batch.inputs, loss_only=True).loss.backward()
        optimizer.step()
    copy = answering.empty_copy()
    copy.model.load_state_dict(answering.plain_weights(answering.model.state_dict()), strict=False)
    copy.model.eval()
    assert all(one.embedding_D is not None for one in copy.answer(asked, NOTHING))


def _words(folder: Path) -> str:
    """A saved model of words alone, and the dual encoder beside it."""
    plain = tiny_mllm()
    plain.save(plain.model.state_dict(), folder / "words")
    drawing(folder)
    return str(folder / "words")


# ---------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
@pytest.mark.parametrize("layers", [(-1,), (-3, -1)])
def test_what_an_answer_shows_is_what_training_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fusion: str, layers: Any
) -> None:
    """The embedding of an answer is that of the same dialogue rendered whole, alone, in a batch and packed."""
    answering, given = drawing(tmp_path, fusion=fusion, output={"layers": layers}), pictures(2)
    model, asked = answering.model, []
    dialogues = [request("a cat"), request("it", picture="1.png"), request("two small red cars")]
    decide(answering, monkeypatch)
    said = answering.answer(dialogues, given)
    assert all(one.ended and one.text == "" and one.tokens == 1 for one in said)

    def keep(wanted: Any) -> torch.Tensor:
        asked.extend(wanted)
        return Targets()(wanted)

    answering.reply_targets = keep
    batch = answering.collate(dialogues, given)
    body = model.body(**{k: v for k, v in batch.inputs.items() if k != "reply_embeds"}, deep=True)
    whole_KD = model.output.read(model.output.states(body), batch.inputs["input_ids"])
    order = [[text for text, _ in asked].index(d.turns[0].picture) for d in dialogues]
    embeds_BD = torch.stack([one.embedding_D for one in said if one.embedding_D is not None])
    assert torch.allclose(embeds_BD, whole_KD[order], atol=1e-5)
    assert torch.allclose(embeds_BD.norm(dim=1), torch.ones(3))
    for dialogue, one in zip(dialogues, said, strict=True):
        alone = answering.answer([dialogue], given)[0].embedding_D
        assert alone is not None
        assert one.embedding_D is not None
        assert torch.allclose(alone, one.embedding_D, atol=1e-5)
    assert not torch.allclose(embeds_BD[0], embeds_BD[2], atol=1e-3)


def test_words_before_a_picture_are_said_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering = drawing(tmp_path)
    here = answering.renderer._ids("here: ")
    decide(answering, monkeypatch, here)
    one = answering.answer([request("a cat")], NOTHING)[0]
    assert (one.text, one.tokens, one.ended) == ("here:", len(here) + 1, True)
    decide(answering, monkeypatch)
    other = answering.answer([request("a cat")], NOTHING)[0]
    assert one.embedding_D is not None
    assert other.embedding_D is not None
    assert not torch.allclose(one.embedding_D, other.embedding_D, atol=1e-4)


def test_answers_of_words_have_no_embedding(tmp_path: Path) -> None:
    answering, given = drawing(tmp_path, seed=3), pictures(2)
    plain = tiny_mllm(seed=3)
    for one, other in zip(
        answering.answer(some_dialogues(), given), plain.answer(some_dialogues(), given), strict=True
    ):
        assert one.embedding_D is None or one.ended
        if one.embedding_D is None:
            assert other.embedding_D is None


# ------------------------------------------------------------------------------------------------------------------ losses


def test_the_loss_by_hand() -> None:
    draw = torch.Generator().manual_seed(1)
    e, text, picture = F.normalize(torch.randn(3, 4, 5, generator=draw), dim=-1)
    text[2] = text[0]  # the same caption: rows 0 and 2 are positives of each other
    picture[1] = 0  # nobody has it
    loss = reply_loss(e, torch.stack([text, picture], dim=1), 0.5)
    cosine = sum(1 - float(e[i] @ text[i]) for i in range(4)) / 4
    share = {0: {0: 0.5, 2: 0.5}, 1: {1: 1.0}, 2: {0: 0.5, 2: 0.5}, 3: {3: 1.0}}

    def contrast(others: torch.Tensor, rows: list[int]) -> float:
        total = 0.0
        for left, right in ((e, others), (others, e)):
            for i in rows:
                z = torch.stack([left[i].double() @ right[j].double() / 0.5 for j in rows])
                logp = dict(zip(rows, z.log_softmax(0).tolist(), strict=True))
                total -= sum(weight * logp[j] for j, weight in share[i].items())
        return total / len(rows) / 2

    by_hand = cosine + contrast(text, [0, 1, 2, 3]) + contrast(picture, [0, 2, 3])
    assert float(loss) == pytest.approx(by_hand, abs=1e-5)
    # one process: the same as the loss of dual encoders
    key_K, known = torch.tensor([0, 1, 0, 3]), torch.tensor([0, 2, 3])
    theirs = infonce(e, text, torch.tensor(2.0), key_K)
    theirs = theirs + infonce(e[known], picture[known], torch.tensor(2.0), key_K[known])
    assert float(loss) == pytest.approx(cosine + float(theirs), abs=1e-5)


def test_a_batch_of_words_costs_nothing_and_leaves_no_parameter_without_gradient(tmp_path: Path) -> None:
    answering = drawing(tmp_path)
    answering.reply_targets = Targets()
    words = [request("a cat", words="an animal"), request("it", words="a circle", picture="0.png")]
    batch = answering.collate(words, pictures(1))
    assert batch.inputs["reply_embeds"].shape == (0, 2, WIDTH)
    loss = answering.model(**batch.inputs, loss_only=True).loss
    bare = {name: value for name, value in batch.inputs.items() if name != "reply_embeds"}
    assert loss.item() == answering.model(**bare, loss_only=True).loss.item()
    loss.backward()
    grads = {name: p.grad for name, p in answering.model.output.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    # words push the decision down; the rest learns nothing
    assert {name for name, grad in grads.items() if grad is not None and grad.abs().sum() > 0} == {
        "decision.weight",
        "decision.bias",
    }


def test_the_weight_scales_the_projectors_part_alone(tmp_path: Path) -> None:
    answering = drawing(tmp_path)
    answering.reply_targets = Targets()
    dialogues = [request("a cat", key="1"), request("two", words="2"), request("a dog")]
    batch = answering.collate(dialogues, NOTHING)
    asked = answering.reply_targets.asked[0]
    assert sorted(asked) == [("a cat", "1"), ("a dog", "")]
    losses = []
    for weight in (0.0, 1.0, 3.0):
        answering.model.output.weight = weight
        losses.append(answering.model(**batch.inputs, loss_only=True).loss.item())
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)
    assert losses[1] > losses[0]


def test_earlier_pictures_have_words_alone_as_targets(tmp_path: Path) -> None:
    answering, targets = drawing(tmp_path), Targets()
    answering.reply_targets = targets
    turns = (Turn(("draw a cat",), "", picture="a cat"), Turn(("now a dog",), "", picture="a dog"))
    answering.collate([Dialogue("d", (), turns, reply="7")], NOTHING)
    assert targets.asked == [[("a cat", ""), ("a dog", "7")]]


# -------------------------------------------------------------------------------------------------------- building, folders


@LANGUAGES
def test_saved_and_loaded_it_shows_the_same(tmp_path: Path, language: str) -> None:
    answering = drawing(tmp_path, language=language)
    answering.save(answering.model.state_dict(), tmp_path / "model")
    loaded = load_answering(str(tmp_path / "model"), CPU)
    assert isinstance(loaded, MllmAnswering)
    assert loaded.renderer.routing_ids == answering.renderer.routing_ids
    for name, value in answering.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name]), name
    copy = answering.empty_copy()
    copy.model.load_state_dict(answering.model.state_dict())
    again = build_mllm(
        MllmModelConfig(checkpoint=str(tmp_path / "model"), max_tokens=64, max_answer_tokens=4)
    )
    assert isinstance(again.model.output, OutputSide)
    batch = answering.collate([request("a cat")], NOTHING)
    logits = [one.model(**batch.inputs).logits for one in (answering, loaded, copy, again)]
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_a_checkpoints_output_side_takes_a_new_weight_but_no_new_shape(tmp_path: Path) -> None:
    answering = drawing(tmp_path)
    answering.save(answering.model.state_dict(), tmp_path / "model")
    same = {"clip": str(tmp_path / "clip"), "hidden": 16}

    def built(**output: Any) -> MllmAnswering:
        keys = {"checkpoint": str(tmp_path / "model"), "max_tokens": 64, "output": {**same, **output}}
        return build_mllm(MllmModelConfig.model_validate(keys))

    again = built(weight=2.5)
    assert again.model.output.weight == again.model.config.output["weight"] == 2.5
    with pytest.raises(ConfigError) as error:
        built(tokens=2)
    assert str(error.value) == "model.output.tokens=2: the checkpoint's output part has 4"


def test_a_checkpoint_of_words_is_given_one(tmp_path: Path) -> None:
    plain = tiny_mllm()
    plain.save(plain.model.state_dict(), tmp_path / "words")
    drawing(tmp_path)
    config = MllmModelConfig(
        checkpoint=str(tmp_path / "words"), max_tokens=64, output=OutputConfig(clip=str(tmp_path / "clip"))
    )
    answering = build_mllm(config)
    assert answering.renderer.routing_ids == (320, 322, 323, 324)
    given = pictures(1)
    asked = some_dialogues(1)[:2]
    spans = answering.renderer.spans(asked[0])
    assert 321 in [token for span in spans for token in span.ids]
    # what it knew it still knows: the table has a row more
    before, after = plain.likelihood(asked, given)[0], answering.likelihood(asked, given)[0]
    assert torch.allclose(before, after, atol=0.5)


def test_a_folder_that_holds_no_dual_encoder(tmp_path: Path) -> None:
    plain = tiny_mllm()
    plain.save(plain.model.state_dict(), tmp_path / "words")
    with pytest.raises(CheckpointError) as error:
        add_output(plain.model, mllm_tokenizer(), OutputConfig(clip=str(tmp_path / "words")))
    assert str(error.value) == (f"{tmp_path / 'words'}: holds a fmray_mllm model, not a dual encoder (CLIP)")


# ---------------------------------------------------------------------------------------------------------------- learning


def test_it_learns_when_to_draw_and_what(tmp_path: Path) -> None:
    things = ["cat", "dog", "red car", "blue boat", "tree", "moon"]
    answering, targets = drawing(tmp_path, loud=False, output={"temperature": 0.2}), Targets()
    answering.reply_targets = targets
    asked = [request(thing, key=thing) for thing in things]
    told = [request(thing, words=f"{thing[0]}") for thing in things]
    batch = answering.collate([*asked, *told], NOTHING)
    model = answering.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):  # at 200 the last word was still a matter of the threads' rounding
        optimizer.zero_grad()
        model(**batch.inputs, loss_only=True).loss.backward()
        optimizer.step()
    model.eval()
    said = answering.answer([*asked, *told], NOTHING)
    assert [one.embedding_D is not None for one in said] == [True] * 6 + [False] * 6
    assert [one.text for one in said[6:]] == [thing[0] for thing in things]
    gallery = NearestPicture(tuple(things), torch.stack([targets.of(thing) for thing in things]), str.encode)
    embeds = torch.stack([one.embedding_D for one in said[:6] if one.embedding_D is not None])
    assert [picture.key for picture in gallery.generate(embeds)] == things


# --------------------------------------------------------------------------------------------------------------- generator


def test_the_nearest_picture_is_exact_and_the_first_of_equals() -> None:
    draw = torch.Generator().manual_seed(0)
    embeds = F.normalize(torch.randn(6, WIDTH, generator=draw), dim=1)
    embeds[4] = embeds[1]
    gallery = NearestPicture(tuple("abcdef"), embeds, lambda key: key.encode(), top=3)
    found = gallery.generate(torch.stack([embeds[4], embeds[5]]))
    assert [one.key for one in found] == ["b", "f"]
    assert found[0].image == b"b"
    assert [key for key, _ in found[0].nearest[:2]] == ["b", "e"]
    assert found[1].cosine == pytest.approx(1)
    assert [cosine for _, cosine in found[1].nearest] == pytest.approx(
        (embeds @ embeds[5]).sort(descending=True).values[:3].tolist()
    )
    with pytest.raises(DataError, match="embeddings of shape \\(1, 3\\), but its pictures have width 8"):
        gallery.generate(torch.ones(1, 3))
    with pytest.raises(DataError, match="not finite"):
        gallery.generate(torch.full((1, WIDTH), torch.nan))
