"""The dual encoder: masks, pooling, freezing, saving, and the hub's CLIP and SigLIP in and out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, CLIPConfig, CLIPModel, ResNetConfig, SiglipConfig, SiglipModel

from fmray.config.schema import DataConfig, ImageConfig, ModelConfig, ObjectiveConfig, PartConfig, TowerConfig
from fmray.errors import CheckpointError, ConfigError
from fmray.models.clip import DualEncoder, build_dual_encoder
from fmray.models.freezing import parameter_groups
from fmray.models.preparation import image_statistics, normalized_pixels
from fmray.models.saved import from_transformers, load_dual_encoder, save_preparation, to_transformers
from fmray.models.towers import pool, tower_width
from tests.tiny import tiny_batch, tiny_config, tiny_model


def test_embeddings_are_unit_vectors_and_do_not_depend_on_padding() -> None:
    model, batch = tiny_model().eval(), tiny_batch(4)
    out = model(batch.pixels_BCHW, batch.token_ids_BT, batch.mask_BT)
    assert torch.allclose(out.image_embeds.norm(dim=1), torch.ones(4), atol=1e-6)
    wider_ids = torch.cat([batch.token_ids_BT, torch.full((4, 4), 7)], 1)
    wider_mask = torch.cat([batch.mask_BT, torch.zeros(4, 4, dtype=torch.long)], 1)
    assert torch.allclose(model.encode_text(wider_ids, wider_mask), out.text_embeds, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean", "eos", "last"])
def test_pooling_goes_by_the_mask(pooling: str) -> None:
    hidden = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    outputs = type("Outputs", (), {"last_hidden_state": hidden})()
    expected = {
        "cls": hidden[:, 0],
        "mean": torch.stack([hidden[0, :3].mean(0), hidden[1, :2].mean(0)]),
        "eos": torch.stack([hidden[0, 2], hidden[1, 1]]),
        "last": torch.stack([hidden[0, 2], hidden[1, 1]]),
    }[pooling]
    assert torch.equal(pool(outputs, pooling, mask), expected)  # type: ignore[arg-type]


def test_temperature_is_bounded_at_100_and_starts_where_it_is_told() -> None:
    model = tiny_model()
    assert model.logit_scale_and_bias()[0].item() == pytest.approx(5.0)
    model.temperature.log_scale.data.fill_(50.0)
    assert model.logit_scale_and_bias()[0].item() == pytest.approx(100.0)
    assert tiny_model(objective="siglip").logit_scale_and_bias()[1].item() == -10.0  # type: ignore[union-attr]


def test_image_statistics() -> None:
    assert image_statistics(ImageConfig(normalize="none")) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    own = ImageConfig(normalize="custom", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert image_statistics(own) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    model = tiny_model()
    black = normalized_pixels(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), model.image)
    white = normalized_pixels(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), model.image)
    assert black.unique().tolist() == [-1.0]
    assert white.unique().tolist() == [1.0]


def test_batch_norm_statistics_stay_while_its_scale_learns() -> None:
    config = tiny_config()
    config.vision_config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    config.vision_pooling = "mean"
    assert tower_width(config.vision_config) == 16
    model, batch = DualEncoder(config).train(), tiny_batch(4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    model(batch.pixels_BCHW, batch.token_ids_BT, batch.mask_BT).image_embeds.sum().backward()
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers() if name in before)
    norms = [p for name, p in model.vision.named_parameters() if "normalization" in name]
    assert norms
    assert all(p.grad is not None for p in norms)


# ------------------------------------------------------------------------------------------------------------ freezing


def test_one_spec_freezes_and_sets_rates() -> None:
    model = tiny_model()
    parts = {
        "vision": PartConfig(train="none"),
        "text": PartConfig(train="last:1", lr=1e-5, weight_decay=0.5),
        "temperature": PartConfig(lr=1e-2),
    }
    groups = {g.name: g for g in parameter_groups(model, parts, lr=1e-3, weight_decay=0.1)}  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in model.vision.parameters())
    learning = {name for name, p in model.text.named_parameters() if p.requires_grad}
    assert learning
    assert all("layer.1." in name for name in learning)
    assert (groups["text"].lr, groups["text"].weight_decay) == (1e-5, 0.5)
    assert groups["text/no_decay"].weight_decay == 0.0
    assert all(p.dim() < 2 for p in groups["text/no_decay"].parameters)
    assert (groups["temperature/no_decay"].lr, groups["vision_projection"].lr) == (1e-2, 1e-3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"vision": PartConfig(train="last:9")}, "has only 2 blocks"),
        ({"temperature": PartConfig(train="last:1")}, "has no blocks"),
        (
            dict.fromkeys(
                ("vision", "text", "vision_projection", "text_projection", "temperature"),
                PartConfig(train="none"),
            ),
            "every part is locked",
        ),
    ],
)
def test_impossible_freezing_is_named(parts: dict[str, PartConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parameter_groups(tiny_model(), parts, lr=1e-3, weight_decay=0.1)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- on the disk


@pytest.fixture
def tokenizer(tmp_path: Path) -> object:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "dog": 2, "cat": 3, "a": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def test_saved_folder_loads_with_ours_and_with_auto_classes(tmp_path: Path, tokenizer: object) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    from fmray.models.saved import save_dual_encoder

    model, batch = tiny_model().eval(), tiny_batch(3)
    save_dual_encoder(model, tokenizer, tmp_path / "m")  # type: ignore[arg-type]
    loaded = load_dual_encoder(str(tmp_path / "m"), torch.device("cpu"))
    auto = AutoModel.from_pretrained(tmp_path / "m")
    expected = model(batch.pixels_BCHW, batch.token_ids_BT, batch.mask_BT)
    for other in (loaded.model, auto.eval()):
        out = other(batch.pixels_BCHW, batch.token_ids_BT, batch.mask_BT)
        assert torch.equal(out.image_embeds, expected.image_embeds)
        assert torch.equal(out.text_embeds, expected.text_embeds)
        assert torch.equal(out.logit_scale, expected.logit_scale)
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("dog cat")["input_ids"] == [2, 3]
    assert loaded.image == model.image
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "m")
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_hub_checkpoints_come_in_and_go_out_equal(kind: str, tmp_path: Path, tokenizer: object) -> None:
    torch.manual_seed(1)
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    text = {
        **tower,
        "vocab_size": 50,
        "max_position_embeddings": 8,
        "eos_token_id": 49,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    if kind == "clip":
        whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).eval()
    else:
        whole = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
        whole.logit_scale.data.fill_(math.log(10))
        whole.logit_bias.data.fill_(-10)
    whole.save_pretrained(tmp_path / "hub")
    ours = from_transformers(whole, ImageConfig(size=16, normalize="half"))
    save_preparation(ours, tokenizer, tmp_path / "hub")  # type: ignore[arg-type]
    pixels, ids = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), torch.randint(3, 49, (4, 8))
    ids[:, -1] = 49
    mask = torch.ones_like(ids)
    expected = whole(pixel_values=pixels / 127.5 - 1, input_ids=ids, return_dict=True)
    loaded = load_dual_encoder(str(tmp_path / "hub"), torch.device("cpu")).model
    out = loaded(pixels, ids, mask)
    assert torch.allclose(out.image_embeds, expected.image_embeds, atol=1e-6)
    assert torch.allclose(out.text_embeds, expected.text_embeds, atol=1e-6)
    assert torch.allclose(out.logit_scale, whole.logit_scale.exp(), atol=1e-5)
    again = to_transformers(loaded)(pixel_values=pixels / 127.5 - 1, input_ids=ids, return_dict=True)
    assert torch.allclose(again.logits_per_image, expected.logits_per_image, atol=1e-5)


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, **shape)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a bert model, not a dual encoder"):
        load_dual_encoder(str(tmp_path), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="no such folder"):
        load_dual_encoder(str(tmp_path / "nowhere"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (TowerConfig(source="arch:vit"), "architecture without weights"),
        (TowerConfig(source="arch:vitt", pretrained=False), "no such architecture"),
        (TowerConfig(source="./nowhere"), "no such folder"),
        (TowerConfig(source="arch:vit", pretrained=False, overrides={"hiden_size": 3}), "has no such key"),
    ],
)
def test_towers_that_cannot_be_built_name_the_key(tower: TowerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_dual_encoder(ModelConfig(vision=tower), ObjectiveConfig(), DataConfig())
    assert caught.value.key.startswith("model.vision")


def test_folded_batch_norm_is_the_same_function_and_survives_saving(
    tmp_path: Path, tokenizer: object
) -> None:
    from fmray.models.saved import save_dual_encoder
    from fmray.models.towers import fold_batch_norm

    config = tiny_config()
    config.vision_config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    config.vision_pooling = "mean"
    model, batch = DualEncoder(config).eval(), tiny_batch(4)
    for module in model.vision.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.uniform_(-1, 1)
    expected = model.encode_image(batch.pixels_BCHW)
    fold_batch_norm(model.vision)
    model.config.folded_batch_norm = True
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert torch.allclose(model.encode_image(batch.pixels_BCHW), expected, atol=1e-5)
    save_dual_encoder(model, tokenizer, tmp_path / "m")  # type: ignore[arg-type]
    loaded = load_dual_encoder(str(tmp_path / "m"), torch.device("cpu")).model
    assert torch.equal(loaded.encode_image(batch.pixels_BCHW), model.encode_image(batch.pixels_BCHW))
