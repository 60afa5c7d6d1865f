"""What learns: every freezing of the VQA model learns what it says, in the groups and in a step; parts that are not there."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from fmray.config.answers import FREEZINGS, AnswersConfig, Freezing, VqaModelConfig
from fmray.config.schema import PartConfig
from fmray.errors import ConfigError
from fmray.models.freezing import parameter_groups
from tests.tiny import tiny_model
from tests.tiny_vqa import dialogues, pictures, tiny_vqa

PROJECTIONS = {"vision_projection", "text_projection"}


def may_learn(freezing: str, name: str) -> bool:
    """What a freezing promises, told from a parameter's name alone."""
    part = name.split(".")[0]
    if part in PROJECTIONS or freezing == "nothing":
        return True
    if freezing == "all_but_projections":
        return False
    if part == "decoder":
        return freezing != "decoder" or ".crossattention." in name or ".ln_cross_attn." in name
    return part not in {"image": {"vision"}, "text": {"text"}, "encoders": {"vision", "text"}}.get(
        freezing, set()
    )


def test_every_freezing_is_described_and_tested() -> None:
    assert set(FREEZINGS) == set(get_args(Freezing))
    assert len(FREEZINGS) == 6


@pytest.mark.parametrize("freezing", get_args(Freezing))
def test_a_freezing_learns_exactly_what_it_says(freezing: Freezing) -> None:
    answering = tiny_vqa()
    model = answering.model
    parts = AnswersConfig(model=VqaModelConfig(freeze=freezing)).learning
    groups = parameter_groups(model, parts, lr=0.1, weight_decay=0.1)
    answering.hold_locked_parts()
    promised = {name for name, _ in model.named_parameters() if may_learn(freezing, name)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group.parameters]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == promised

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
    )
    model.train()
    model(**answering.collate(dialogues(), pictures()).inputs).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == promised
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= promised
    assert {name for name in promised if before[name].dim() > 1} <= moved


def test_a_part_that_is_not_there_is_named_with_those_that_are() -> None:
    model = tiny_vqa().model
    with pytest.raises(ConfigError) as error:
        parameter_groups(model, {"visoin": PartConfig(train="none")}, lr=1e-3, weight_decay=0.1)
    assert str(error.value) == (
        "parts.visoin='none': the model has no such part; there are: vision, text, vision_projection, text_projection, "
        "decoder; did you mean vision?"
    )
    with pytest.raises(ConfigError, match=r"decoder$"):
        parameter_groups(model, {"zzz": PartConfig()}, lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("part", ["vision", "text", "text_projection"])
def test_cross_attention_alone_needs_one(part: str) -> None:
    with pytest.raises(ConfigError) as error:
        parameter_groups(
            tiny_vqa().model, {part: PartConfig(train="cross_attention")}, lr=1e-3, weight_decay=0.1
        )
    assert (
        str(error.value) == f"parts.{part}.train='cross_attention': has no cross-attention; use all or none"
    )


def test_a_dual_encoder_has_no_decoder() -> None:
    with pytest.raises(
        ConfigError, match=r"there are: vision, text, vision_projection, text_projection, temperature$"
    ):
        parameter_groups(tiny_model(), {"decoder": PartConfig(train="none")}, lr=1e-3, weight_decay=0.1)


def test_the_last_blocks_of_a_decoder_learn_and_its_rates_are_its_own() -> None:
    model = tiny_vqa().model
    parts = {"decoder": PartConfig(train="last:1", lr=1e-4, weight_decay=0.5)}
    groups = {g.name: g for g in parameter_groups(model, parts, lr=1e-3, weight_decay=0.1)}
    learning = {name for name, p in model.decoder.named_parameters() if p.requires_grad}
    assert learning
    assert all(name.startswith(("transformer.h.1.", "transformer.ln_f.")) for name in learning)
    assert (groups["decoder"].lr, groups["decoder"].weight_decay) == (1e-4, 0.5)
    assert groups["decoder/no_decay"].weight_decay == 0.0
    assert (groups["vision"].lr, groups["vision"].weight_decay) == (1e-3, 0.1)
