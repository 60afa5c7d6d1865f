"""Every decoder against the module it was made from: its forward of the whole sequence, its own `generate`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fmray.errors import ConfigError, DataError
from fmray.models.decoding import causal, t5, weights
from fmray.models.decoding import generate as generate_module
from fmray.models.decoding.any import AnyCausalDecoder, AnySeq2SeqDecoder
from fmray.models.decoding.generate import Generated, Sampling, generate, make_decoder
from fmray.models.decoding.weights import Precision
from tests.unit.models.decoding.policies import (
    EOS,
    MAKERS,
    OWN_STEPS,
    PAD,
    VOCABULARY,
    forward_logits,
    mixed_prompts,
    policy,
    shake,
)
from tests.unit.models.decoding.test_sampling import chi_square

SAMPLING = Sampling(max_new_tokens=9, eos_id=EOS, pad_id=PAD, seed=11)
THREE_EACH = torch.arange(4).repeat_interleave(3)

every_policy = pytest.mark.parametrize("name", MAKERS)


def answers(
    model: Any, sampling: Sampling = SAMPLING, prompt_of_B: Tensor = THREE_EACH, **how: Any
) -> Generated:
    ids, mask = how.pop("prompts", mixed_prompts())
    samples = how.pop("samples", torch.arange(len(prompt_of_B)) + 100)
    return generate(make_decoder(model, **how), ids, mask, samples, prompt_of_B, sampling)


def often_ending(model: Any) -> Sampling:
    """An EOS that comes early for some rows and late for others: the token that the policy draws most."""
    sampling = replace(SAMPLING, max_new_tokens=16)
    drawn = answers(model, replace(sampling, eos_id=-1)).ids_BT.flatten().bincount(minlength=VOCABULARY)
    return replace(sampling, eos_id=int(drawn.argmax()))


@torch.inference_mode()
def forced_logits(decoder: Any, prompt_of_B: Tensor, answer_BT: Tensor) -> Tensor:
    """The decoder's logits while it is made to say `answer_BT`, [B, T, V]."""
    ids, mask = mixed_prompts("right")
    steps = [decoder.start(ids, mask, prompt_of_B, answer_BT.shape[1])]
    steps += [decoder.step(answer_BT[:, t]) for t in range(answer_BT.shape[1] - 1)]
    return torch.stack(steps, dim=1)


def aligned_prompts(prompt_of_B: Tensor) -> tuple[Tensor, Tensor]:
    """The right-padded prompts of `forced_logits`, left-padded for the module's forward."""
    ids, mask = mixed_prompts("right")
    lengths = mask.sum(1)
    rows = [row.roll(7 - int(n)) for row, n in zip(ids, lengths, strict=True)]
    masks = [row.roll(7 - int(n)) for row, n in zip(mask, lengths, strict=True)]
    return torch.stack(rows)[prompt_of_B], torch.stack(masks)[prompt_of_B]


@every_policy
def test_logits_are_those_of_the_whole_sequence(name: str) -> None:
    model = policy(name)
    answer_BT = torch.randint(0, VOCABULARY, (len(THREE_EACH), 8))
    expected = forward_logits(model, *aligned_prompts(THREE_EACH), answer_BT)
    got = forced_logits(make_decoder(model), THREE_EACH, answer_BT)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert got.std() > 0.1


@every_policy
def test_greedy_is_transformers_greedy(name: str) -> None:
    model = policy(name).eval()
    shake(model, 0.4)  # far from flat, so that answers differ
    ids, mask = prompts = mixed_prompts("right" if model.config.is_encoder_decoder else "left")
    ours = answers(model, replace(SAMPLING, greedy=True), torch.arange(4), prompts=prompts)
    theirs = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=9, eos_token_id=EOS, pad_token_id=PAD
    )
    theirs = theirs[:, 1:] if model.config.is_encoder_decoder else theirs[:, 7:]
    assert torch.equal(ours.ids_BT, theirs[:, : ours.ids_BT.shape[1]])
    assert len(ours.ids_BT.unique()) > 1


@every_policy
def test_logp_is_what_a_second_forward_scores(name: str) -> None:
    model = policy(name)
    sampling = replace(often_ending(model), temperature=1.4)
    out = answers(model, sampling)
    ids, mask = mixed_prompts()
    logits = forward_logits(model, ids[THREE_EACH], mask[THREE_EACH], out.ids_BT)
    scored = (logits / 1.4).log_softmax(-1).gather(2, out.ids_BT[..., None]).squeeze(2)
    torch.testing.assert_close(out.logp_BT, scored * out.mask_BT, atol=1e-5, rtol=1e-5)
    assert not out.logp_BT[out.mask_BT == 0].any()


@every_policy
def test_masks_follow_the_end_and_not_the_ids(name: str) -> None:
    model = policy(name)
    sampling = often_ending(model)
    out = answers(model, sampling)
    assert len(set(out.mask_BT.sum(1).tolist())) > 1, "a test of rows that end apart"
    for ids, mask, ended in zip(out.ids_BT, out.mask_BT, out.ended_B, strict=True):
        real = ids[: int(mask.sum())]
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert bool(ended) == (int(real[-1]) == sampling.eos_id)
        assert sampling.eos_id not in real[:-1]
        assert ended or len(real) == sampling.max_new_tokens
        assert (ids[len(real) :] == PAD).all()
    eos_as_pad = answers(model, replace(sampling, pad_id=sampling.eos_id))
    assert torch.equal(eos_as_pad.mask_BT, out.mask_BT)
    assert torch.equal(eos_as_pad.ended_B, out.ended_B)


@every_policy
def test_padding_changes_nothing(name: str) -> None:
    model = policy(name)
    expected = answers(model)
    ids, mask = mixed_prompts()
    for left, right in ((3, 0), (0, 2), (1, 4)):
        wide_ids = torch.nn.functional.pad(ids, (left, right), value=-100)
        wide_mask = torch.nn.functional.pad(mask, (left, right))
        out = answers(model, prompts=(wide_ids, wide_mask))
        assert torch.equal(out.ids_BT, expected.ids_BT)
        assert torch.equal(out.logp_BT, expected.logp_BT)


@every_policy
def test_company_and_order_change_nothing(name: str) -> None:
    model = policy(name)
    sampling = often_ending(model)
    whole = answers(model, sampling)
    decoder = make_decoder(model)
    order = torch.tensor([10, 3, 0, 7])
    ids, mask = mixed_prompts()
    for rows in [order, *torch.arange(12).split(1)]:
        prompts = THREE_EACH[rows]
        some = generate(decoder, ids[prompts], mask[prompts], rows + 100, torch.arange(len(rows)), sampling)
        length = some.ids_BT.shape[1]
        assert torch.equal(some.ids_BT, whole.ids_BT[rows, :length])
        assert torch.equal(some.mask_BT, whole.mask_BT[rows, :length])
        torch.testing.assert_close(some.logp_BT, whole.logp_BT[rows, :length], atol=1e-5, rtol=1e-5)
    assert not torch.equal(whole.ids_BT[0], whole.ids_BT[1]), "samples of one prompt differ"


@every_policy
def test_finished_rows_that_leave_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy(name)
    sampling = often_ending(model)
    decoder = make_decoder(model)
    held: list[int] = []
    keep = decoder.keep
    monkeypatch.setattr(decoder, "keep", lambda rows: (held.append(len(rows)), keep(rows)))
    ids, mask = mixed_prompts()
    left, stayed = (
        generate(decoder, ids, mask, torch.arange(12) + 100, THREE_EACH, sampling)
        for share in (generate_module.LEAVE_AT_SHARE, 0)
        if not monkeypatch.setattr(generate_module, "LEAVE_AT_SHARE", share)
    )
    assert any(0 < rows < 12 for rows in held), "some rows left while others went on"
    assert torch.equal(left.ids_BT, stayed.ids_BT)
    torch.testing.assert_close(left.logp_BT, stayed.logp_BT, atol=1e-5, rtol=1e-5)


@every_policy
def test_samples_follow_the_policy_and_the_seed(name: str) -> None:
    model = policy(name)
    count, once = 4000, replace(SAMPLING, max_new_tokens=1)
    prompt_of_B = torch.full((count,), 1)
    out = answers(model, once, prompt_of_B)
    ids, mask = mixed_prompts()
    p = forward_logits(model, ids[1:2], mask[1:2], torch.zeros(1, 1, dtype=torch.int64)).softmax(-1)[0, 0]
    observed = out.ids_BT[:, 0].bincount(minlength=VOCABULARY).double()
    assert abs(chi_square(observed, p.double() * count)) < 4
    assert torch.equal(answers(model, once, prompt_of_B).ids_BT, out.ids_BT)
    assert not torch.equal(answers(model, replace(once, seed=12), prompt_of_B).ids_BT, out.ids_BT)


@every_policy
def test_new_weights_are_read_at_refresh(name: str) -> None:
    model = policy(name)
    decoder = make_decoder(model)
    shake(model)
    decoder.refresh()
    answer_BT = torch.randint(0, VOCABULARY, (4, 5))
    expected = forward_logits(model, *aligned_prompts(torch.arange(4)), answer_BT)
    got = forced_logits(decoder, torch.arange(4), answer_BT)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@every_policy
def test_bf16_stays_near(name: str) -> None:
    model = policy(name)
    answer_BT = torch.randint(0, VOCABULARY, (len(THREE_EACH), 8))
    expected = forward_logits(model, *aligned_prompts(THREE_EACH), answer_BT)
    got = forced_logits(make_decoder(model, "bf16"), THREE_EACH, answer_BT)
    assert got.dtype == torch.float32
    error = (got - expected).square().mean().sqrt() / expected.std()
    assert 1e-5 < error < 0.03


@pytest.mark.parametrize("name", OWN_STEPS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_matrices_that_cannot_be_packed_do_too(
    name: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an accelerator runs: plain products, and a cache in the matrices' precision."""
    monkeypatch.setattr(weights, "packs", lambda weight: False)
    for module in (causal, t5):
        monkeypatch.setattr(module, "cache_dtype", lambda precision, device: weights.DTYPES[precision])
    model = policy(name)
    answer_BT = torch.randint(0, VOCABULARY, (len(THREE_EACH), 8))
    expected = forward_logits(model, *aligned_prompts(THREE_EACH), answer_BT)
    error = forced_logits(make_decoder(model, precision), THREE_EACH, answer_BT) - expected
    assert error.square().mean().sqrt() / expected.std() < {"fp32": 1e-5, "bf16": 0.04}[precision]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@every_policy
def test_the_same_tokens_on_an_accelerator(name: str) -> None:
    model = policy(name)
    here = answers(model)
    there = answers(model.cuda())
    assert torch.equal(there.ids_BT.cpu(), here.ids_BT)
    torch.testing.assert_close(there.logp_BT.cpu(), here.logp_BT, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_any_decoder_agrees_with_the_hand_written_step(name: str) -> None:
    model = policy(name)
    kind = AnySeq2SeqDecoder if model.config.is_encoder_decoder else AnyCausalDecoder
    ids, mask = mixed_prompts()
    ours, general = (
        generate(decoder, ids, mask, torch.arange(12), THREE_EACH, SAMPLING)
        for decoder in (make_decoder(model), kind(model, "fp32"))
    )
    assert torch.equal(ours.ids_BT, general.ids_BT)
    torch.testing.assert_close(ours.logp_BT, general.logp_BT, atol=1e-5, rtol=1e-5)


def test_architectures_with_a_step_of_their_own() -> None:
    general = (AnyCausalDecoder, AnySeq2SeqDecoder)
    for name in MAKERS:
        assert isinstance(make_decoder(policy(name)), general) == (name not in OWN_STEPS), name


def test_encoder_reads_each_prompt_once() -> None:
    model = policy("bart")
    seen: list[int] = []
    model.get_encoder().register_forward_hook(
        lambda module, args, kwargs, out: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    answers(model)
    assert seen == [4]


def test_log_probabilities_can_stand_in_a_loss() -> None:
    out = answers(policy("llama"))
    new_logp = torch.zeros_like(out.logp_BT, requires_grad=True)
    (((new_logp - out.logp_BT).exp() * out.logp_BT * out.mask_BT).sum() / out.mask_BT.sum()).backward()
    assert new_logp.grad is not None


@pytest.mark.parametrize("name", OWN_STEPS)
def test_broken_weights_name_the_sample(name: str) -> None:
    model = policy(name)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="sample 100: logits at position 0 are not finite"):
        answers(model)


def test_what_cannot_be_asked() -> None:
    model = policy("gpt2")
    ids, mask = mixed_prompts()
    with pytest.raises(DataError, match="prompt 2 has no token"):
        answers(model, prompts=(ids, mask * torch.tensor([[1], [1], [0], [1]])))
    with pytest.raises(DataError, match=r"\(4, 7\) and mask \(4, 6\)"):
        answers(model, prompts=(ids, mask[:, 1:]))
    with pytest.raises(DataError, match="reaches from 0 to 4, but there are 4 prompts"):
        answers(model, prompt_of_B=torch.tensor([0, 4]))
    with pytest.raises(DataError, match="at least 1"):
        answers(model, prompt_of_B=torch.tensor([], dtype=torch.int64))
    with pytest.raises(DataError, match=r"7 \+ 34 tokens, but the policy has 40 positions"):
        answers(model, replace(SAMPLING, max_new_tokens=34))
    with pytest.raises(ConfigError, match="temperature=0"):
        replace(SAMPLING, temperature=0)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        replace(SAMPLING, max_new_tokens=0)
    with pytest.raises(ConfigError, match="precision='fp16'"):
        make_decoder(model, "fp16")  # type: ignore[arg-type]
