"""What a multimodal LLM is built from: towers, language models, saved ones, adapters; configurations that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

from fmray.config.answers import LanguageModelConfig, MllmModelConfig, ProjectorConfig
from fmray.config.rlhf import LoraConfig
from fmray.config.schema import ImageConfig, TowerConfig
from fmray.errors import ConfigError
from fmray.models.answering import build_answering, load_answering
from fmray.models.language import save_language_model
from fmray.models.mllm_answering import MllmAnswering
from fmray.models.saved import save_dual_encoder
from tests.tiny import tiny_model
from tests.tiny_mllm import about, mllm_tokenizer, pictures, some_dialogues, tiny_language

MODELS = pytest.mark.parametrize("language", ["llama", "gpt2"])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A language model of each family, a ViT and a dual encoder on the disk."""
    root = tmp_path_factory.mktemp("sources")
    torch.manual_seed(7)
    for family in ("llama", "gpt2"):
        speaker = tiny_language(family)
        save_language_model(speaker, dict(speaker.named_parameters()), mllm_tokenizer(), root / family)
    vit = ViTModel(
        ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        add_pooling_layer=False,
    )
    save_language_model(vit, dict(vit.named_parameters()), mllm_tokenizer(), root / "vit")
    save_dual_encoder(tiny_model(), mllm_tokenizer(), root / "dual")
    return {name: str(root / name) for name in ("llama", "gpt2", "vit", "dual")}


def wanted(sources: dict[str, str], **changes: Any) -> MllmModelConfig:
    keys: dict[str, Any] = {
        "vision": TowerConfig(source=sources["vit"]),
        "language": LanguageModelConfig(source=sources["llama"]),
        "image": ImageConfig(size=16, normalize="half"),
        "max_tokens": 200,
        "max_answer_tokens": 8,
        **changes,
    }
    return MllmModelConfig(**keys)


def test_parts_come_with_their_weights(sources: dict[str, str]) -> None:
    answering = build_answering(wanted(sources))
    assert isinstance(answering, MllmAnswering)
    theirs = load_file(Path(sources["llama"], "model.safetensors"))
    mine = answering.model.language.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert answering.model.config.picture_tokens == 16
    assert {name for name, _ in answering.model.named_children()} == {"vision", "projector", "language"}
    assert answering.answer([about(0, 0)], pictures(1))


def test_a_dual_encoders_tower_with_its_preparation(sources: dict[str, str]) -> None:
    config = wanted(sources, vision=TowerConfig(source=sources["dual"]), image=ImageConfig())
    answering = build_answering(config)
    assert isinstance(answering, MllmAnswering)
    dual = tiny_model().vision.state_dict()
    assert all(torch.equal(value, dual[name]) for name, value in answering.model.vision.state_dict().items())
    assert answering.image == ImageConfig(size=16, normalize="half")
    assert answering.model.config.grid == [2, 2]


def test_from_scratch(sources: dict[str, str]) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = wanted(
        sources,
        language=LanguageModelConfig(
            source="arch:llama",
            tokenizer=sources["llama"],
            pretrained=False,
            overrides={**shape, "vocab_size": 320, "num_key_value_heads": 2},
        ),
    )
    answering = build_answering(config)
    assert answering.model.config.image_token_id == 320
    assert answering.collate([about(0, 0)], pictures(1)).tokens > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"language": LanguageModelConfig(source="arch:gpt2", pretrained=False)},
            "model.language.tokenizer=None: an architecture has no tokenizer: say where one is",
        ),
        (
            {"max_tokens": 600},
            "model.max_tokens=600: with max_answer_tokens=8 it is more than the language model's 512 positions",
        ),
        (
            {"row_tokens": 100},
            "model.row_tokens=100: must hold the longest dialogue: at least model.max_tokens=200",
        ),
        (
            {"projector": ProjectorConfig(kind="pixel_shuffle", shuffle=3)},
            "model.projector.shuffle=3: must divide the picture tower's grid of 4 x 4 tokens",
        ),
        ({"vision_layer": -9}, "model.vision_layer=-9: the tower has 3 hidden layers"),
        (
            {"vision_layer": 1},
            "model.vision_layer=1: is counted from the end (-1, -2, …), and a convolutional tower has its last map alone",
        ),
        (
            {"max_tokens": 16},
            "model.max_tokens=16: a picture alone takes 16 tokens; raise it or shorten pictures (pixel_shuffle)",
        ),
    ],
)
def test_configurations_that_cannot_be(sources: dict[str, str], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_answering(wanted(sources, **changes))
    assert str(caught.value) == said


def test_other_models_are_no_language_models(sources: dict[str, str]) -> None:
    with pytest.raises(
        ConfigError, match=r"^model.language.source=.*is a vit model; take a decoder-only language"
    ):
        build_answering(wanted(sources, language=LanguageModelConfig(source=sources["vit"])))
    with pytest.raises(ConfigError, match=r"^model.image.size=32: the picture tower does not take it: "):
        build_answering(wanted(sources, image=ImageConfig(size=32)))


def test_stage_two_begins_where_stage_one_ended(sources: dict[str, str], tmp_path: Path) -> None:
    first = build_answering(wanted(sources, template="plain", max_answer_tokens=4))
    assert isinstance(first, MllmAnswering)
    with torch.no_grad():
        first.model.projector[0].weight.add_(1)
    first.save(first.model.state_dict(), tmp_path)
    second = build_answering(
        MllmModelConfig(checkpoint=str(tmp_path), max_tokens=100, max_answer_tokens=8, row_tokens=128)
    )
    assert isinstance(second, MllmAnswering)
    mine = first.model.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in second.model.state_dict().items())
    config = second.model.config
    assert (config.template, config.max_tokens, config.row_tokens) == ("chat", 100, 128)
    assert second.renderer.template == "chat"


@MODELS
def test_an_adapter_learns_and_is_merged(language: str, sources: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = wanted(sources, language=LanguageModelConfig(source=sources[language]), lora=LoraConfig(rank=2))
    answering, given = build_answering(config), pictures(2)
    assert isinstance(answering, MllmAnswering)
    learning = {name for name, p in answering.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in learning} == {"vision", "projector", "language"}
    assert all(".lora_" in name for name in learning if name.startswith("language"))
    with torch.no_grad():
        for name, parameter in answering.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5)
    answering.model.eval()
    batch = answering.collate(some_dialogues(), given).inputs
    adapted = answering.model(**batch).loss
    assert not torch.allclose(adapted, build_answering(config).model.eval()(**batch).loss)
    twin = answering.empty_copy()
    weights = dict(answering.model.state_dict())
    twin.model.load_state_dict(answering.plain_weights(weights))
    torch.testing.assert_close(twin.model.eval()(**batch).loss, adapted, atol=1e-5, rtol=0)
    answering.save(weights, tmp_path)
    loaded = load_answering(str(tmp_path), CPU)
    torch.testing.assert_close(loaded.model(**batch).loss, adapted, atol=1e-5, rtol=0)
    assert loaded.answer(some_dialogues(), given) == answering.answer(some_dialogues(), given)
