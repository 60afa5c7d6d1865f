"""The multimodal LLM's forward pass: nothing leaks between dialogues, the loss by hand, pictures in their places, gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fmray.errors import ConfigError, DataError
from fmray.models.gated_attention import GatedLayers
from fmray.models.mllm_answering import MllmAnswering, as_line
from fmray.models.packing import pack
from fmray.models.projectors import PixelShuffle, make_projector, projected_tokens
from fmray.types import Dialogue, Pictures, Turn
from tests.tiny_mllm import about, pictures, some_dialogues, tiny_language, tiny_mllm

MODELS = pytest.mark.parametrize("language", ["llama", "gpt2"])
FUSIONS = pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
PAIR = Dialogue(
    "pair",
    ("0.png", "1.png"),
    (Turn(("", " beside ", "which?"), "red"), Turn(("and now?",), "no")),
)


def without_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "labels"}


@torch.no_grad()
def predicted(answering: MllmAnswering, dialogues: list[Dialogue], given: Pictures) -> list[Tensor]:
    """Each dialogue's logits before its learned tokens, [learned, V], from one packed forward pass."""
    lines = [as_line(d, answering.renderer.fitted(d, 200), given) for d in dialogues]
    packed = pack(lines, answering.model.config.row_tokens)
    logits = answering.model(**without_labels(answering.collate(dialogues, given).inputs)).logits
    found = []
    for number in range(len(dialogues)):
        rows, columns = ((packed.owner_RL == number) & (packed.labels_RL != -100)).nonzero(as_tuple=True)
        found.append(logits[rows, packed.before_RL[rows, columns]])
    return found


@MODELS
@FUSIONS
@pytest.mark.parametrize("row_tokens", [None, 256])
def test_a_packed_dialogue_is_the_dialogue_alone(language: str, fusion: str, row_tokens: int | None) -> None:
    answering = tiny_mllm(language=language, fusion=fusion, row_tokens=row_tokens)
    dialogues, given = [*some_dialogues(), PAIR], pictures(2)
    together = predicted(answering, dialogues, given)
    for dialogue, logits in zip(dialogues, together, strict=True):
        [alone] = predicted(answering, [dialogue], given)
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
    assert (together[0] - together[3]).abs().max() > 1e-3  # one question, another picture: it looks


@MODELS
def test_any_attention_kernel_takes_the_mask(language: str) -> None:
    answering, given = tiny_mllm(language=language, row_tokens=256), pictures(2)
    inputs = answering.collate(some_dialogues(), given).inputs
    loss = answering.model(**inputs).loss
    answering.model.language.set_attn_implementation("eager")
    torch.testing.assert_close(answering.model(**inputs).loss, loss, atol=1e-5, rtol=0)


@MODELS
@FUSIONS
def test_another_branch_or_group_changes_nothing(language: str, fusion: str) -> None:
    answering = tiny_mllm(language=language, fusion=fusion, row_tokens=256)
    given = pictures(2)
    first = [about(0, 0), about(0, 1), about(1, 2)]
    other = [about(0, 0), about(0, 1, answer="it"), about(1, 2, answer="no circle")]
    changed = Pictures(given.keys, torch.cat([given.pixels_NCHW[:1], 255 - given.pixels_NCHW[1:]]))  # type: ignore[index, operator]
    before = predicted(answering, first, given)
    after = predicted(answering, other, changed)
    torch.testing.assert_close(after[0], before[0], atol=1e-6, rtol=0)


@MODELS
@FUSIONS
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_loss_is_the_mean_over_labels_shifted_once(language: str, fusion: str, template: str) -> None:
    answering, given = tiny_mllm(language=language, fusion=fusion, template=template), pictures(2)
    # captions: several answers begin right behind the picture that they share
    captions = [Dialogue(a, ("0.png",), (Turn(("", ""), a),)) for a in ("red", "a blue circle", "two")]
    dialogues = [*captions, *some_dialogues()]
    batch = answering.collate(dialogues, given)
    output = answering.model(**batch.inputs, loss_only=True)
    assert output.logits is None
    with_logits = answering.model(**batch.inputs)
    assert with_logits.logits.shape == (*batch.inputs["input_ids"].shape, 320)
    assert torch.equal(with_logits.loss, output.loss)
    logp, count = 0.0, 0
    for dialogue in dialogues:  # each alone in full logits, its labels shifted by hand
        inputs = answering.collate([dialogue], given).inputs
        logits = answering.model(**without_labels(inputs)).logits[0].log_softmax(-1)
        labels = inputs["labels"][0]
        for place in range(1, len(labels)):
            if labels[place] != -100:
                logp, count = logp + logits[place - 1, labels[place]], count + 1
    assert batch.tokens == count
    torch.testing.assert_close(output.loss, -logp / count, atol=1e-5, rtol=0)


def test_labels_without_packing_are_shifted_once_too() -> None:
    model = tiny_mllm().model
    ids = torch.randint(3, 320, (2, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    logits = model(input_ids=ids).logits
    wanted = F.cross_entropy(logits[:, 3:-1].flatten(0, 1), labels[:, 4:].flatten())
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, wanted)
    with pytest.raises(DataError, match=r"^labels: no token to learn in the whole batch$"):
        model(input_ids=ids, labels=torch.full_like(ids, -100))


@MODELS
def test_padding_on_either_side_changes_nothing(language: str) -> None:
    model = tiny_mllm(language=language).model
    ids, P = torch.randint(3, 320, (1, 6)), 16
    ids = torch.cat([torch.full((1, P), model.config.image_token_id), ids], dim=1)
    pixels = pictures(1).pixels_NCHW
    alone = model(input_ids=ids, pixel_values=pixels).logits
    for left, right in ((3, 0), (0, 3)):
        mask = F.pad(torch.ones_like(ids), (left, right))
        padded = model(input_ids=F.pad(ids, (left, right)), attention_mask=mask, pixel_values=pixels).logits
        torch.testing.assert_close(padded[:, left : left + ids.shape[1]], alone, atol=1e-5, rtol=0)
    last = model(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits
    torch.testing.assert_close(last, alone[:, -1:])


def test_pictures_go_to_their_places_in_reading_order() -> None:
    answering = tiny_mllm()
    model, given = answering.model, pictures(3)
    ids = torch.full((2, 34), 5)
    ids[0, 1:17] = ids[0, 18:34] = ids[1, 2:18] = model.config.image_token_id
    projected = model.projected(given.pixels_NCHW)
    assert projected is not None
    words = model.prompt_words(ids, projected)
    assert torch.equal(words[0, 1:17], projected[0])
    assert torch.equal(words[0, 18:34], projected[1])
    assert torch.equal(words[1, 2:18], projected[2])
    assert torch.equal(words[1, 0], model.get_input_embeddings()(torch.tensor(5)))
    with pytest.raises(DataError) as caught:
        model(input_ids=ids, pixel_values=given.pixels_NCHW[:2])  # type: ignore[index]
    assert str(caught.value) == (
        "pictures: 48 placeholders in the rows, but 32 tokens of pictures to put there"
    )


@FUSIONS
def test_features_stand_for_pictures(fusion: str) -> None:
    answering, given = tiny_mllm(fusion=fusion), pictures(2)
    features = Pictures(given.keys, features_NPF=answering.picture_features(given.pixels_NCHW))  # type: ignore[arg-type]
    dialogues = some_dialogues()
    by_pixels = answering.model(**answering.collate(dialogues, given).inputs).loss
    by_features = answering.model(**answering.collate(dialogues, features).inputs).loss
    torch.testing.assert_close(by_features, by_pixels)
    assert answering.answer(dialogues, features) == answering.answer(dialogues, given)
    wrong = Pictures(given.keys, features_NPF=torch.zeros(2, 9, 24))
    with pytest.raises(
        DataError, match=r"^pictures: features of 9 tokens a picture, but the model's tower makes 4 x 4$"
    ):
        answering.model(**answering.collate(dialogues, wrong).inputs)


@FUSIONS
@pytest.mark.parametrize("vision", ["vit", "mobilenet_v2"])
def test_a_batch_of_texts_touches_every_parameter(fusion: str, vision: str) -> None:
    """Under ZeRO-3 a rank that does not call a module waits forever for the ranks that do."""
    answering = tiny_mllm(fusion=fusion, vision=vision)
    text = [about(None, 0), about(None, 1)]
    batch = answering.collate(text, Pictures(()))
    assert batch.inputs["picture_valid"].tolist() == [False]
    answering.model.train()
    loss = answering.model(**batch.inputs).loss
    loss.backward()
    for name, parameter in answering.model.named_parameters():
        assert parameter.grad is not None, name
        if not name.startswith("language"):
            assert not parameter.grad.any(), name
    shown = tiny_mllm(fusion=fusion, vision=vision)
    side = answering.image.size
    beside = shown.collate(text, Pictures(("x",), torch.full((1, 3, side, side), 200, dtype=torch.uint8)))
    torch.testing.assert_close(shown.model(**beside.inputs).loss, loss)


def test_layers_that_are_not_read_have_a_gradient_of_zero() -> None:
    answering = tiny_mllm(vision_layer=-2)
    batch = answering.collate(some_dialogues(), pictures(2))
    answering.model(**batch.inputs).loss.backward()
    grads = {name: p.grad for name, p in answering.model.vision.named_parameters()}
    last = [name for name in grads if ".1." in name]
    assert last
    assert all(g is not None for g in grads.values())
    assert not any(grads[name].any() for name in last)  # type: ignore[union-attr]
    assert any(g.any() for g in grads.values())  # type: ignore[union-attr]


def test_held_batch_norm_and_locked_parts_stay_in_evaluation_mode() -> None:
    model = tiny_mllm(vision="mobilenet_v2").model
    model.train()
    assert not any(m.training for m in model.vision.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert model.language.training
    model.language.requires_grad_(False)
    model.train()
    assert not model.language.training
    assert model.projector.training


def test_a_language_model_is_not_changed_by_being_taken_in() -> None:
    torch.manual_seed(0)
    speaker = tiny_language()
    weights = {name: value.clone() for name, value in speaker.state_dict().items()}
    made = tiny_mllm(loud=False)
    again = type(made.model)(made.model.config, made.model.vision, speaker)
    assert all(torch.equal(value, weights[name]) for name, value in again.language.state_dict().items())
    assert again.language.config._attn_implementation == "sdpa"
    assert again.language.lm_head.weight is again.language.get_input_embeddings().weight


# ------------------------------------------------------------------------------------------------------------------ fusion


@MODELS
def test_a_fresh_cross_attention_model_is_the_text_model(language: str) -> None:
    """tanh(0) = 0: the gates are shut, exactly."""
    answering = tiny_mllm(language=language, fusion="cross_attention", loud=False)
    given = pictures(2)
    inputs = without_labels(answering.collate([about(0, 0)], given).inputs)
    logits = answering.model(**inputs).logits
    plain = answering.model.language(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]
    ).logits
    torch.testing.assert_close(logits, plain, atol=1e-6, rtol=0)
    assert answering.model.config.image_token_id not in inputs["input_ids"]
    batch = answering.collate([about(0, 0)], given)
    answering.model(**batch.inputs).loss.backward()
    gates = {n: p.grad for n, p in answering.model.named_parameters() if n.endswith("_gate")}
    assert len(gates) == 4
    assert all(bool(g.any()) for g in gates.values())  # type: ignore[union-attr]  # but they open


@MODELS
def test_gated_layers_by_hand(language: str) -> None:
    """Equations of §2.2 and figure 4, with loops over heads."""
    made = tiny_mllm(language=language, fusion="cross_attention").model.cross_attention
    assert isinstance(made, GatedLayers)
    layer: Any = made.layers[0]
    x, tokens = torch.randn(1, 3, 32), torch.randn(1, 5, 32)
    from fmray.models.gated_attention import Memory

    seen = torch.tensor([[[0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]], dtype=torch.bool)
    with torch.no_grad():
        got = layer(x, Memory(tokens, seen))
        keys, values = layer.key_value(tokens[0]).chunk(2, -1)
        queries = layer.query(layer.norm(x[0]))
        read = torch.zeros(3, 32)
        for i in (1, 2):
            for h in range(4):
                part = slice(8 * h, 8 * h + 8)
                use = seen[0, i]
                weights = (keys[use][:, part] @ queries[i, part] / 8**0.5).softmax(0)
                read[i, part] = weights @ values[use][:, part]
        y = x[0] + layer.attention_gate.tanh() * layer.out(read)
        fed = layer.down(F.gelu(layer.up(layer.feed_norm(y))))
        fed[0] = 0  # a word before all pictures is left as it is
        torch.testing.assert_close(got[0], y + layer.feed_gate.tanh() * fed, atol=1e-5, rtol=1e-5)
        assert torch.equal(got[0, 0], x[0, 0])


@MODELS
@FUSIONS
def test_activation_checkpointing_changes_no_gradient(language: str, fusion: str) -> None:
    grads = []
    for checkpointing in (False, True):
        answering = tiny_mllm(language=language, fusion=fusion)
        if checkpointing:
            answering.model.activation_checkpointing_enable()
        answering.model.train()
        answering.model(**answering.collate(some_dialogues(), pictures(2)).inputs).loss.backward()
        grads.append({n: p.grad for n, p in answering.model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


def test_a_copied_model_has_its_own_gated_layers() -> None:
    answering = tiny_mllm(fusion="cross_attention")
    twin = copy.deepcopy(answering.model)
    inputs = without_labels(answering.collate(some_dialogues(), pictures(2)).inputs)
    before = answering.model(**inputs).logits
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("_gate"):
                parameter.zero_()
    assert torch.equal(answering.model(**inputs).logits, before)
    assert not torch.allclose(twin(**inputs).logits, before)


def test_what_cross_attention_cannot_be_hung_into() -> None:
    with pytest.raises(
        ConfigError, match=r"^model.cross_attention_every=5: the language model has 4 blocks: take at most"
    ):
        tiny_mllm(fusion="cross_attention", cross_attention_every=5)
    speaker = tiny_language()
    speaker.config.model_type = "bloom"
    with pytest.raises(
        ConfigError, match=r"^model.fusion='cross_attention': works with gpt2, llama, .* not bloom; take"
    ):
        GatedLayers(speaker, 2)


# --------------------------------------------------------------------------------------------------------------- projectors


def test_pixel_shuffle_puts_neighbours_together() -> None:
    grid = torch.arange(24.0).view(1, 24, 1)  # 4 x 6, numbered in reading order
    blocks = PixelShuffle((4, 6), 2)(grid)
    assert blocks[0].tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert blocks[0].tolist()[3] == [12, 13, 18, 19]
    assert projected_tokens("pixel_shuffle", (4, 6), 2) == 6
    with pytest.raises(ConfigError) as caught:
        make_projector("pixel_shuffle", 8, 8, (4, 6), 3)
    cure = "must divide the picture tower's grid of 4 x 6 tokens"
    assert str(caught.value) == f"model.projector.shuffle=3: {cure}"


@pytest.mark.parametrize(("kind", "tokens"), [("linear", 16), ("mlp", 16), ("pixel_shuffle", 4)])
def test_every_projector_speaks(kind: str, tokens: int) -> None:
    answering = tiny_mllm(projector=kind)
    assert answering.model.config.picture_tokens == tokens
    batch = answering.collate(some_dialogues(), pictures(2))
    assert (batch.inputs["input_ids"] == answering.model.config.image_token_id).sum() == 2 * tokens
    answering.model(**batch.inputs).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in answering.model.projector.parameters())
