"""The VQA model: its loss by hand, its generation with and without cache, padding and company, fusion, pictures once each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.models.vqa import VqaModel, cross_attention_gradient_norms
from tests.tiny_vqa import dialogues, pictures, tiny_vqa


def batch(**options: object) -> tuple[VqaModel, dict[str, Tensor]]:
    """A model without noise and six rows: three pictures, four distinct questions of two lengths, answers of three lengths."""
    answering = tiny_vqa(**options)  # type: ignore[arg-type]
    return answering.model.eval(), answering.collate(dialogues(), pictures()).inputs


def question(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch without its answers."""
    return {name: value for name, value in inputs.items() if name not in ("decoder_input_ids", "labels")}


def one_by_one(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each row alone, in the plainest form: its own picture and its own question without padding."""
    rows = []
    for picture, asked in zip(inputs["picture_of_B"], inputs["question_of_B"], strict=True):
        length = int(inputs["attention_mask"][asked].sum())
        rows.append(
            {
                "input_ids": inputs["input_ids"][asked : asked + 1, :length],
                "pixel_values": inputs["pixel_values"][picture : picture + 1],
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------- the loss


def test_loss_is_the_mean_cross_entropy_of_labelled_tokens_by_hand() -> None:
    model, inputs = batch()
    output = model(**inputs)
    logits, answers = output.logits.tolist(), inputs["decoder_input_ids"].tolist()
    against = []
    for row, ids in enumerate(answers):
        for place in range(len(ids) - 1):
            if inputs["labels"][row, place + 1] == -100:
                continue
            scores = logits[row][place]
            norm = math.log(sum(math.exp(score) for score in scores))
            against.append(norm - scores[ids[place + 1]])
    assert len(against) == (inputs["labels"][:, 1:] != -100).sum()
    assert output.loss.item() == pytest.approx(sum(against) / len(against), abs=1e-5)
    assert output.logits.shape == (6, inputs["labels"].shape[1], model.config.decoder_config.vocab_size)


def test_labels_are_shifted_once() -> None:
    model, inputs = batch()
    row = {**inputs, "decoder_input_ids": torch.tensor([[0, 3, 5, 0]] * 6)}
    labels = row["decoder_input_ids"]
    alone = torch.full_like(labels, -100)
    for place in (1, 2, 3):  # the label at `place` is predicted from the token before it
        alone[:, place] = labels[:, place]
        output = model(**{**row, "labels": alone})
        by_hand = F.cross_entropy(output.logits[:, place - 1], labels[:, place])
        torch.testing.assert_close(output.loss, by_hand)
        alone[:, place] = -100
    # the last token is predicted and predicts nothing; the first predicts and is not predicted
    loss = model(**{**row, "labels": labels}).loss
    other_end = torch.cat([labels[:, :-1], labels[:, -1:] + 4], dim=1)
    torch.testing.assert_close(model(**{**row, "decoder_input_ids": other_end, "labels": labels}).loss, loss)
    other_start = torch.cat([labels[:, :1] + 4, labels[:, 1:]], dim=1)
    torch.testing.assert_close(
        model(**{**row, "decoder_input_ids": labels, "labels": other_start}).loss, loss
    )


def test_loss_alone_is_the_same_loss_and_gradient() -> None:
    model, inputs = batch()
    whole = model(**inputs)
    whole.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = model(**inputs, loss_only=True)
    alone.loss.backward()
    assert alone.logits is None
    torch.testing.assert_close(alone.loss, whole.loss)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("convolutional", [False, True])
def test_pictures_and_questions_once_each_equal_one_by_one_in_loss_and_gradient(convolutional: bool) -> None:
    model, inputs = batch(convolutional=convolutional)
    grouped = model(**inputs).loss
    grouped.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    tokens = (inputs["labels"][:, 1:] != -100).sum(1)
    total = torch.zeros(())
    for row, alone in enumerate(one_by_one(inputs)):
        answer = {name: inputs[name][row : row + 1] for name in ("decoder_input_ids", "labels")}
        loss = model(**alone, **answer).loss * tokens[row] / tokens.sum()
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, grouped.detach(), atol=1e-6, rtol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("convolutional", [False, True])
def test_features_given_equal_pixels_given(convolutional: bool) -> None:
    model, inputs = batch(convolutional=convolutional)
    pixels = inputs.pop("pixel_values")
    features = model.picture_tokens(pixels)
    asked = model.question_tokens(inputs.pop("input_ids"), inputs["attention_mask"])
    given = model(**inputs, image_features=features, question_features=asked)
    with_pixels = batch(convolutional=convolutional)[1]
    assert torch.equal(given.logits, model(**with_pixels).logits)
    as_floats = {**with_pixels, "pixel_values": pixels.float() / 255}
    assert torch.equal(model(**as_floats).logits, given.logits)


def test_a_feature_maps_places_are_tokens_and_its_statistics_are_held() -> None:
    answering = tiny_vqa(convolutional=True)
    model, pixels = answering.model.train(), pictures().pixels_NCHW
    assert pixels is not None
    large = F.interpolate(pixels, size=(64, 96))
    before = {name: value.clone() for name, value in model.named_buffers()}
    tokens = model.picture_tokens(large)
    assert tokens.shape == (3, 2 * 3, 1280)
    normal = (large.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(tokens[:, 4], model.vision(pixel_values=normal).last_hidden_state[:, :, 1, 1])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_call_without_a_picture_or_a_question_is_refused() -> None:
    model, inputs = batch()
    with pytest.raises(ValueError, match="pixel_values or image_features: one of them is needed"):
        model(**{**inputs, "pixel_values": None})
    with pytest.raises(ValueError, match="input_ids or question_features: one of them is needed"):
        model(**{**inputs, "input_ids": None})


# -------------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("fusion", ["concat", "mean"])
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_uncached(fusion: str, beams: int) -> None:
    model, inputs = batch(fusion=fusion)
    asked, settings = question(inputs), {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    cached = model.generate(**asked, **settings)
    assert torch.equal(cached, model.generate(**asked, **settings, use_cache=False))
    assert len({tuple(row) for row in cached.tolist()}) > 1  # it does look at what is asked


def test_greedy_generation_equals_repeated_forward_passes() -> None:
    model, inputs = batch()
    asked = question(inputs)
    made = model.generate(**asked, max_new_tokens=6, do_sample=False)
    for row, alone in enumerate(one_by_one(inputs)):
        ids = [model.config.start_id]
        while len(ids) < 7 and (len(ids) == 1 or ids[-1] != model.config.end_id):
            logits = model(**alone, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        said = made[row].tolist()
        assert said[: len(ids) - 1] == ids[1:]
        assert set(said[len(ids) - 1 :]) <= {model.config.end_id}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_a_batch_is_answered_as_each_row_alone_without_padding(fusion: str, beams: int) -> None:
    model, inputs = batch(fusion=fusion)
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    together = model.generate(**question(inputs), **settings)
    assert (inputs["attention_mask"] == 0).any()  # some are padded
    for row, alone in enumerate(one_by_one(inputs)):
        single = model.generate(**alone, **settings)[0].tolist()
        said = together[row].tolist()
        assert said[: len(single)] == single
        assert set(said[len(single) :]) <= {model.config.end_id}


@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_what_stands_at_padding_is_not_read(fusion: str) -> None:
    model, inputs = batch(fusion=fusion)
    other = dict(inputs)
    hidden = inputs["attention_mask"] == 0
    other["input_ids"] = inputs["input_ids"].masked_fill(hidden, 7)
    torch.testing.assert_close(model(**other).logits, model(**inputs).logits)
    wider = {name: F.pad(inputs[name], (0, 4)) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**inputs | wider).logits, model(**inputs).logits)


@torch.no_grad()
def test_beams_find_the_likeliest_answer_where_they_see_all() -> None:
    """As many beams as words and two steps: the search is exhaustive, its best the best of all by enumeration."""
    model, inputs = batch()
    words, end = model.config.decoder_config.vocab_size, model.config.end_id
    made = model.generate(
        **question(inputs), max_new_tokens=2, num_beams=words, length_penalty=0.0, do_sample=False
    )
    for row, alone in enumerate(one_by_one(inputs)):
        first = model(**alone, decoder_input_ids=torch.tensor([[0]])).logits[0, -1].log_softmax(0)
        scores = {(end,): float(first[end])}
        for a in range(words):
            if a != end:
                second = model(**alone, decoder_input_ids=torch.tensor([[0, a]])).logits[0, -1].log_softmax(0)
                scores |= {(a, b): float(first[a] + second[b]) for b in range(words)}
        best = max(scores, key=lambda ids: scores[ids])
        assert tuple(made[row].tolist()[: len(best)]) == best


def test_the_record_of_a_generation_has_the_same_sequences() -> None:
    model, inputs = batch()
    asked = question(inputs)
    record = model.generate(**asked, do_sample=False, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(record.sequences, model.generate(**asked, do_sample=False))
    assert record.sequences.shape[1] <= model.config.max_answer_tokens


# ------------------------------------------------------------------------------------------------------------------ fusion


def test_a_mean_memory_teaches_cross_attention_nothing_about_where_to_look() -> None:
    """Softmax over one key is 1 whatever the query (the textbook's fusion): only the value path learns."""
    norms = {}
    for fusion in ("concat", "mean"):
        model, inputs = batch(fusion=fusion)
        model(**inputs).loss.backward()
        norms[fusion] = cross_attention_gradient_norms(model)
    for side in ("query", "key"):
        assert norms["concat"][side] > 1e-3
        assert norms["mean"][side] < 1e-6 * norms["concat"][side]
    assert norms["mean"]["value"] > 1e-3


def test_gradient_norms_are_those_of_the_parts_of_the_matrix() -> None:
    model, inputs = batch()
    assert cross_attention_gradient_norms(model) == {"query": 0.0, "key": 0.0, "value": 0.0}
    model(**inputs).loss.backward()
    norms, squares = cross_attention_gradient_norms(model), 0.0
    for block in model.decoder.transformer.h:
        squares += float(block.crossattention.c_attn.weight.grad.square().sum())
        squares += float(block.crossattention.q_attn.weight.grad.square().sum())
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(squares, rel=1e-5)


@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_the_memory_is_what_the_fusion_says(fusion: str) -> None:
    model, inputs = batch(fusion=fusion)
    asked = question(inputs)
    rows = asked.pop("picture_of_B"), asked.pop("question_of_B")
    sides = model.sides(**{"image_features": None, "question_features": None, **asked})
    memory = model.fused(*sides, *rows)
    seen = model.vision_projection(model.picture_tokens(inputs["pixel_values"]))[inputs["picture_of_B"]]
    mask = inputs["attention_mask"]
    asked = model.text_projection(model.question_tokens(inputs["input_ids"], mask))
    for row, of in enumerate(inputs["question_of_B"].tolist()):
        real = asked[of][mask[of].bool()]
        if fusion == "mean":
            expected = (seen[row].mean(0) + real.mean(0)) / 2
            torch.testing.assert_close(memory.last_hidden_state[row], expected.unsqueeze(0))
        else:
            read = memory.last_hidden_state[row][memory.attention_mask[row].bool()]
            torch.testing.assert_close(read, torch.cat([seen[row], real]))


# ---------------------------------------------------------------------------------------------------------------- training


def test_every_parameter_has_a_part_and_a_gradient() -> None:
    model, inputs = batch()
    model(**inputs).loss.backward()
    parts = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert parts == {"vision", "text", "vision_projection", "text_projection", "decoder"}
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.decoder.lm_head.weight is model.decoder.transformer.wte.weight


def test_activation_checkpointing_changes_no_gradient() -> None:
    model, inputs = batch()
    model.train()
    model(**inputs).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**inputs).loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_locked_part_has_no_dropout() -> None:
    model, inputs = batch(dropout=0.5)
    model.vision.requires_grad_(False)
    model.train()
    pixels, ids, mask = inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"]
    assert torch.equal(model.picture_tokens(pixels), model.picture_tokens(pixels))
    assert not torch.equal(model.question_tokens(ids, mask), model.question_tokens(ids, mask))


def test_it_learns_what_it_is_shown() -> None:
    answering = tiny_vqa()
    shown = answering.collate(dialogues(), pictures()).inputs
    optimizer = torch.optim.AdamW(answering.model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = answering.model(**shown, loss_only=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    said = answering.answer(dialogues(), pictures())
    assert [one.text for one in said] == [d.turns[0].answer for d in dialogues()]
    assert [one.tokens for one in said] == [len(d.turns[0].answer.split()) + 1 for d in dialogues()]
    assert all(one.ended for one in said)
