"""States and logits of answers against transformers' own forward; adapters; folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fmray.config.rlhf import LoraConfig
from fmray.errors import ConfigError
from fmray.manifest import MANIFEST, manifest_text, sum_file
from fmray.models.language import (
    adapter_off,
    add_adapter,
    merged_weights,
    open_language_model,
    response_logits,
    response_states,
    save_language_model,
)
from tests.stories import tiny_gpt2, tiny_llama, tiny_t5

FAMILIES = {"t5": tiny_t5, "gpt2": tiny_gpt2, "llama": tiny_llama}


@pytest.fixture(params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FAMILIES[request.param](tmp_path / request.param)


def a_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three prompts of different length, left-padded, with answers of different length, right-padded; 0 is a real token too."""
    prompt_ids = torch.tensor([[0, 0, 40, 41, 1], [0, 50, 51, 52, 1], [60, 61, 62, 63, 1]])
    prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    response_ids = torch.tensor([[70, 71, 72, 1], [73, 1, 0, 0], [74, 75, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    return prompt_ids, prompt_mask, response_ids, mask


def plain_logits(folder: Path, row: int) -> Tensor:
    """transformers' logits of one sample, without any padding."""
    prompt_ids, prompt_mask, response_ids, mask = a_batch()
    prompt = prompt_ids[row][prompt_mask[row].bool()].unsqueeze(0)
    response = response_ids[row][mask[row].bool()].unsqueeze(0)
    if "t5" in folder.name:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        start = torch.zeros(1, 1, dtype=torch.int64)
        return model(input_ids=prompt, decoder_input_ids=torch.cat([start, response[:, :-1]], 1)).logits[0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model(input_ids=torch.cat([prompt, response], 1)).logits[0, prompt.shape[1] - 1 : -1]


@torch.no_grad()
def test_logits_are_transformers_own_whatever_the_padding(folder: Path) -> None:
    model = open_language_model(str(folder), "policy.source").model
    prompt_ids, prompt_mask, response_ids, mask = a_batch()
    states = response_states(model, prompt_ids, prompt_mask, response_ids, mask)
    for row in range(3):
        ours = response_logits(model, states[row][mask[row].bool()])
        torch.testing.assert_close(ours, plain_logits(folder, row), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_shared_prompts_encode_once_and_change_nothing(tmp_path: Path) -> None:
    model = open_language_model(str(tiny_t5(tmp_path / "t5")), "policy.source").model
    prompt_ids, prompt_mask, response_ids, mask = a_batch()
    twice = [tensor.repeat_interleave(2, 0) for tensor in (prompt_ids, prompt_mask, response_ids, mask)]
    rows_seen = []
    model.get_encoder().register_forward_hook(lambda _m, _a, out: rows_seen.append(out[0].shape[0]))
    shared = response_states(model, *twice, shared_prompts=True)
    torch.testing.assert_close(shared, response_states(model, *twice), atol=1e-5, rtol=1e-5)
    assert rows_seen == [3, 6]


def test_dropout_is_off_even_in_training_mode(folder: Path) -> None:
    model = open_language_model(str(folder), "policy.source").model.train()
    states = [response_states(model, *a_batch()) for _ in range(2)]
    assert torch.equal(*states)


@torch.no_grad()
def test_adapter_learns_alone_turns_off_and_merges(folder: Path, tmp_path: Path) -> None:
    plain, adapted = (open_language_model(str(folder), "policy.source") for _ in range(2))
    add_adapter(adapted.model, LoraConfig(rank=4), "policy.lora")
    assert all(("lora_" in n) == p.requires_grad for n, p in adapted.model.named_parameters())
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = response_states(plain.model, *a_batch())
    after = response_states(adapted.model, *a_batch())
    assert (before - after).abs().max() > 1e-3
    with adapter_off(adapted.model):
        assert torch.equal(response_states(adapted.model, *a_batch()), before)
    weights = merged_weights(adapted.model, dict(adapted.model.named_parameters()))
    save_language_model(adapted.model, weights, adapted.tokenizer, tmp_path / "merged")
    merged = open_language_model(str(tmp_path / "merged"), "policy.source").model
    torch.testing.assert_close(response_states(merged, *a_batch()), after, atol=2e-5, rtol=1e-5)


def test_a_saved_model_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    first = open_language_model(str(folder), "policy.source")
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.add_(0.01)
    save_language_model(
        first.model, dict(first.model.named_parameters()), first.tokenizer, tmp_path / "again"
    )
    second = open_language_model(str(tmp_path / "again"), "policy.source")
    assert {n for n, _ in first.model.named_parameters()} == {n for n, _ in second.model.named_parameters()}
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name
    states = response_states(first.model, *a_batch())
    logits = response_logits(first.model, states[0]), response_logits(second.model, states[0])
    assert torch.equal(*logits)


def test_what_is_no_language_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match=r"policy\.source=.*cannot be loaded as a language model"):
        open_language_model(str(tmp_path), "policy.source")


def test_a_run_folder_is_opened_at_its_last_model(tmp_path: Path) -> None:
    """A run has a config.json of its own, which is no model's."""
    run = tmp_path / "run"
    folder = run / "checkpoints" / "step-00000003"
    tiny_gpt2(folder / "model")
    files = [sum_file(path, folder) for path in (folder / "model").iterdir()]
    (folder / MANIFEST).write_text(manifest_text(3, files), encoding="utf-8")
    (run / "config.json").write_text('{"run": {"name": "run"}}', encoding="utf-8")
    assert open_language_model(str(run), "policy.source").model.config.model_type == "gpt2"
