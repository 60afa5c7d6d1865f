"""LoRA policies: the decoder multiplies with what peft's forward adds up, or says that it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fmray.errors import ConfigError
from fmray.models.decoding.generate import make_decoder
from fmray.models.decoding.weights import effective_weight
from tests.unit.models.decoding.policies import VOCABULARY, forward_logits, policy, shake
from tests.unit.models.decoding.test_decoders import aligned_prompts, forced_logits

peft = pytest.importorskip("peft")
FOUR = torch.arange(4)


def lora(name: str, **more: Any) -> Any:
    settings = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.5, "target_modules": "all-linear", **more}
    return peft.get_peft_model(policy(name), peft.LoraConfig(**settings))


def assert_agrees(decoder: Any, model: Any) -> None:
    answer_BT = torch.randint(0, VOCABULARY, (4, 6))
    expected = forward_logits(model, *aligned_prompts(FOUR), answer_BT)
    torch.testing.assert_close(forced_logits(decoder, FOUR, answer_BT), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["t5", "t5 gated untied", "gpt2", "llama"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True, "modules_to_save": ["lm_head"]},
        {"target_modules": ["shared", "wte", "embed_tokens", "q", "c_attn", "q_proj"]},
    ],
    ids=["all matrices", "head kept whole", "embedding"],
)
def test_adapters_are_added(name: str, more: dict[str, Any]) -> None:
    model = lora(name, **more)
    untouched = policy(name)
    decoder = make_decoder(model)
    shake(model, 0.05)
    decoder.refresh()
    assert_agrees(decoder, model)
    with pytest.raises(AssertionError):
        assert_agrees(decoder, untouched)


def test_a_switched_off_adapter_is_left_out_and_a_merged_one_counts_once() -> None:
    model = lora("llama")
    decoder = make_decoder(model)
    shake(model, 0.05)
    with model.disable_adapter():
        decoder.refresh()
        assert_agrees(decoder, model)
    with pytest.raises(AssertionError):
        assert_agrees(decoder, model)
    model.merge_adapter()
    decoder.refresh()
    assert_agrees(decoder, model)


def test_all_active_adapters_of_a_layer_count() -> None:
    model = lora("gpt2")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["c_attn"]))
    shake(model, 0.05)
    model.base_model.set_adapter(["default", "second"])
    assert_agrees(make_decoder(model), model)
    model.set_adapter("second")
    assert_agrees(make_decoder(model), model)


def test_other_low_rank_sums_count_too() -> None:
    model = peft.get_peft_model(policy("llama"), peft.LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]))
    shake(model, 0.05)
    assert_agrees(make_decoder(model), model)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(use_dora=True, target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
    ids=["DoRA", "IA3"],
)
def test_what_is_no_sum_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="merge the adapter"):
        make_decoder(peft.get_peft_model(policy("llama"), config))


def test_a_prompt_tuning_wrapper_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ConfigError, match="adapters that change weights"):
        make_decoder(peft.get_peft_model(policy("llama"), config))


def test_packed_integers_are_refused() -> None:
    layer = torch.nn.Linear(4, 4)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="dequantise"):
        effective_weight(layer)
