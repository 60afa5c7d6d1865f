"""A policy that sees: pixels on their way through an iteration, and what they change. Real tiny models, real pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fmray.data.prompts import open_prompts
from fmray.errors import ConfigError, DataError
from fmray.models.answering import load_answering
from fmray.models.language import embedded_prompts, open_language_model, response_logits, response_states
from fmray.rlhf.learner import PpoLearner
from fmray.rlhf.ppo import inputs_of, learn
from fmray.rlhf.prompt_reader import PromptReader
from fmray.rlhf.publishing import publish, weight_buckets
from fmray.rlhf.records import Rollouts
from fmray.runtime.context import WorkerContext
from fmray.types import Dialogue, Turn
from tests.quizzes import QUESTION, colored, quiz_run, tiny_seer, write_quiz
from tests.rehearsal import credited, started, weights_of
from tests.stories import story_run, tiny_gpt2
from tests.tiny_mllm import about, pictures, some_dialogues, tiny_mllm
from tests.workers import run_workers

SEERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"language": "gpt2", "template": "plain"},
    "mobilenet": {"vision": "mobilenet", "projector": "linear"},
}


@pytest.fixture(params=list(SEERS))
def seer(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_seer(tmp_path / "seer", **SEERS[request.param])


# ------------------------------------------------------------------------------------------- what was sampled is scored


def test_log_probabilities_are_the_samplers_the_learners_and_the_references(
    seer: Path, tmp_path: Path
) -> None:
    options = {"rollout.samples_per_prompt": 2, "rollout.temperature": 0.8}
    learner, context = started(quiz_run(tmp_path, seer, **options))
    judged, batch, metrics = credited(learner, context)
    rollouts = judged.rollouts
    assert metrics["ppo/logp_difference"] < 1e-5
    torch.testing.assert_close(
        batch.old_logp_BT * rollouts.mask_BT, rollouts.rollout_logp_BT, atol=1e-5, rtol=0
    )
    assert judged.reference_logp_BT is not None
    torch.testing.assert_close(judged.reference_logp_BT, rollouts.rollout_logp_BT, atol=1e-5, rtol=0)
    assert rollouts.pixels_BCHW is not None
    assert rollouts.pixels_BCHW.dtype == torch.uint8
    assert len(torch.unique(rollouts.pixels_BCHW.flatten(1), dim=0)) > 4


def test_another_picture_changes_log_probabilities_and_values(seer: Path, tmp_path: Path) -> None:
    """Of the sample whose picture it is, and of no other."""
    learner, context = started(quiz_run(tmp_path, seer))
    judged, _, _ = credited(learner, context)
    assert learner.model.value_head is not None
    torch.nn.init.normal_(learner.model.value_head.weight)
    rollouts = judged.rollouts
    assert rollouts.pixels_BCHW is not None
    pixels = rollouts.pixels_BCHW.clone()
    pixels[3] = 255 - pixels[3]
    rows, real = torch.arange(len(rollouts)), rollouts.mask_BT.bool()

    def outputs(shown: Rollouts) -> dict[str, Tensor]:
        with torch.no_grad():
            found: dict[str, Tensor] = learner.model(**inputs_of(shown, real, real, rows, context.device))
            return found

    before, after = outputs(rollouts), outputs(replace(rollouts, pixels_BCHW=pixels))
    for name in ("logp_BT", "values_BT"):
        change_B = (after[name] - before[name]).abs().amax(1)
        assert change_B[3] > 1e-4, name
        assert change_B[rows != 3].max() < 1e-5, name


def test_states_are_those_that_likelihood_scores() -> None:
    """Beside another road through the same model: packed rows, labels and shared pictures."""
    answering = tiny_mllm()
    shown = pictures(2)
    dialogues = [about(0, 0), about(1, 3), about(1, 1)]
    expected, tokens = answering.likelihood(dialogues, shown)
    for row, dialogue in enumerate(dialogues):
        prompt = [i for span in answering.renderer.spans(dialogue, answer=False) for i in span.ids]
        whole = [i for span in answering.renderer.spans(dialogue) for i in span.ids]
        answer = whole[len(prompt) : len(prompt) + int(tokens[row])]
        ids, response = torch.tensor([prompt]), torch.tensor([answer])
        assert shown.pixels_NCHW is not None
        pixels = shown.pixels_NCHW[shown.rows(dialogue.pictures)]
        asked = (ids, torch.ones_like(ids), response, torch.ones_like(response))
        with torch.no_grad():
            states = response_states(answering.model, *asked, pixels_BCHW=pixels)
            logp = response_logits(answering.model, states[0]).log_softmax(-1)
        found = logp.gather(1, response[0][:, None]).sum()
        torch.testing.assert_close(found, expected[row], atol=1e-4, rtol=1e-5)


def test_the_tower_runs_once_for_equal_pictures(tmp_path: Path) -> None:
    options = {"rollout.samples_per_prompt": 4, "rollout.request_size": 8}
    learner, context = started(quiz_run(tmp_path, tiny_seer(tmp_path / "seer"), **options))
    seen: list[int] = []
    tower: Any = learner.model.policy.vision
    tower.register_forward_hook(lambda _m, _a, out: seen.append(len(out.last_hidden_state)))
    credited(learner, context)
    assert seen
    assert sum(seen) <= 8  # 16 samples of 4 pictures, in two micro-batches


def test_embeddings_are_in_the_order_of_rows() -> None:
    model = tiny_mllm().model
    pixels_N = pictures(3).pixels_NCHW
    assert pixels_N is not None
    ids = torch.tensor([[7, *[320] * 16, 9]]).expand(5, -1)
    order = torch.tensor([2, 0, 2, 1, 0])
    words = embedded_prompts(model, ids, pixels_N[order])
    assert words is not None
    for row, picture in enumerate(order):
        alone = model.prompt_words(ids[:1], model.projected(pixels_N[picture : picture + 1]))
        torch.testing.assert_close(words[row], alone[0], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ requests and ranks


@pytest.mark.parametrize("samples", [1, 2])
def test_a_sample_is_its_own_whatever_request_carries_it(samples: int, tmp_path: Path) -> None:
    seer = tiny_seer(tmp_path / "seer")
    found = []
    for size in (16, 4, 2):
        options = {"rollout.request_size": size, "rollout.samples_per_prompt": samples}
        learner, context = started(quiz_run(tmp_path, seer, **options))
        rollouts = credited(learner, context)[0].rollouts
        found.append(rollouts)
        assert rollouts.responses == found[0].responses
        assert rollouts.pictures == found[0].pictures
        assert rollouts.answers == found[0].answers
        assert rollouts.pixels_BCHW is not None
        assert found[0].pixels_BCHW is not None
        assert torch.equal(rollouts.pixels_BCHW, found[0].pixels_BCHW)


def test_rows_keep_picture_answers_and_question_together(tmp_path: Path) -> None:
    learner, context = started(quiz_run(tmp_path, tiny_seer(tmp_path / "seer")))
    rollouts = credited(learner, context)[0].rollouts
    entries = {e["image"]: e for e in json.loads((tmp_path / "quiz/train.json").read_text())}
    assert rollouts.pixels_BCHW is not None
    assert rollouts.pictures is not None
    assert rollouts.answers is not None
    for row, key in enumerate(rollouts.pictures):
        color = entries[key]["conversations"][1]["value"]
        assert rollouts.answers[row] == (color,)
        assert rollouts.prompts[row] == QUESTION
        assert torch.equal(rollouts.pixels_BCHW[row], colored(int(entries[key]["id"]), color))


def learn_on_ranks(rank: int, world_size: int, folder: str, seer: str) -> tuple[Any, Any, Any]:
    options: dict[str, Any] = {"critic.kind": "shared", "optimizer.eps": 1e-3, "optimizer.lr": 1e-2}
    config = quiz_run(Path(folder) / f"rank{rank}", Path(seer), **options)
    learner, context = started(config, rank, world_size)
    judged, batch, metrics = credited(learner, context)
    metrics |= learn(batch, learner, 0, context)
    return weights_of(learner), metrics, judged.rollouts.texts()


def test_ranks_change_nothing(tmp_path: Path) -> None:
    seer = str(tiny_seer(tmp_path / "seer"))
    (alone,) = run_workers(1, learn_on_ranks, str(tmp_path), seer)
    for weights, metrics, texts in run_workers(2, learn_on_ranks, str(tmp_path), seer):
        assert texts == alone[2]
        for name, weight in alone[0].items():
            torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-4, msg=name)
        for name, value in alone[1].items():
            assert metrics[name] == pytest.approx(value, abs=2e-5, rel=1e-4), name


def test_rollouts_survive_json_padding_joining_and_picking(tmp_path: Path) -> None:
    learner, _ = started(quiz_run(tmp_path, tiny_seer(tmp_path / "seer")))
    learner.crew.ask_ahead(0, version=0, last=5)
    texts, tensors = learner.crew.remembered()
    texts = json.loads(json.dumps(texts))
    whole = learner.crew.judge(learner.crew.act(0)).rollouts
    learner.crew.recall(texts, tensors)
    again = learner.crew.judge(learner.crew.act(0)).rollouts
    assert again.texts() == whole.texts()
    assert again.tensors().keys() == whole.tensors().keys()
    assert all(torch.equal(value, again.tensors()[name]) for name, value in whole.tensors().items())
    assert "pixels_BCHW" in whole.tensors()
    assert whole.texts().keys() == {"prompts", "responses", "pictures", "answers"}
    order = torch.arange(len(whole) - 1, -1, -1)
    halves = [whole.rows(order[:5]), whole.rows(order[5:]).padded_to(60, 9)]
    back = Rollouts.together(halves).rows(order)
    assert back.texts() == whole.texts()
    assert back.pixels_BCHW is not None
    assert whole.pixels_BCHW is not None
    assert torch.equal(back.pixels_BCHW, whole.pixels_BCHW)


# ---------------------------------------------------------------------------------------------------- what learns


def after_one_iteration(
    learner: PpoLearner, context: WorkerContext
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The policy's parameters before and after."""
    before = {name: p.detach().clone() for name, p in learner.model.policy.named_parameters()}
    _, batch, _ = credited(learner, context)
    metrics = learn(batch, learner, 0, context)
    assert all(value == value for value in metrics.values())
    return before, dict(learner.model.policy.named_parameters())


def test_projector_and_language_learn_and_travel_and_the_tower_does_not(tmp_path: Path) -> None:
    config = quiz_run(tmp_path, tiny_seer(tmp_path / "seer"))
    learner, context = started(config)
    sent = {n for b in weight_buckets(learner.model.policy, learner.engine, config) for n in b}
    assert {name.split(".")[0] for name in sent} == {"projector", "language"}
    before, after = after_one_iteration(learner, context)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"projector", "language"}
    assert learner.model.critic is not None
    assert not any(p.requires_grad for p in learner.model.critic.vision.parameters())
    publish(learner.model.policy, learner.engine, 1, config, context)
    assert credited(learner, context, 1)[2]["ppo/logp_difference"] < 1e-5


def test_an_adapter_learns_alone_and_is_its_own_reference(tmp_path: Path) -> None:
    options = {"policy.lora": {"rank": 4}, "reference.kind": "adapter_off", "critic.kind": "shared"}
    config = quiz_run(tmp_path, tiny_seer(tmp_path / "seer"), **options)
    learner, context = started(config)
    sent = {n for b in weight_buckets(learner.model.policy, learner.engine, config) for n in b}
    assert sent
    assert all(name.startswith("language.") and ".lora_" in name for name in sent)
    assert abs(credited(learner, context)[2]["ppo/kl"]) < 1e-5
    before, after = after_one_iteration(learner, context)
    assert all(torch.equal(before[n], after[n]) for n in before if ".lora_" not in n)
    publish(learner.model.policy, learner.engine, 1, config, context)
    _, _, metrics = credited(learner, context, 1)
    assert metrics["ppo/logp_difference"] < 1e-5
    assert abs(metrics["ppo/kl"]) > 1e-6


def test_the_saved_policy_answers_as_the_learner_and_the_adapter_fits_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"policy.lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}}
    seer = tiny_seer(tmp_path / "seer")
    learner, context = started(quiz_run(tmp_path, seer, **options))
    with torch.no_grad():
        for name, parameter in learner.model.policy.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    learner.export()(tmp_path / "out")
    dialogues, shown = some_dialogues(), pictures(2)
    assert learner.language.answering is not None
    expected = learner.language.answering.likelihood(dialogues, shown)[0]
    loaded = load_answering(str(tmp_path / "out"), context.device)
    torch.testing.assert_close(loaded.likelihood(dialogues, shown)[0], expected, atol=1e-3, rtol=1e-4)
    base = load_answering(str(seer), context.device)
    assert (base.likelihood(dialogues, shown)[0] - expected).abs().max() > 0.1
    peft.PeftModel.from_pretrained(base.model, tmp_path / "out" / "adapter").eval()  # in place
    torch.testing.assert_close(base.likelihood(dialogues, shown)[0], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_either_precision_of_rollouts_is_near_the_learner(precision: str, tmp_path: Path) -> None:
    options = {"rollout.precision": precision, "rollout.logp_limit": None}
    learner, context = started(quiz_run(tmp_path, tiny_seer(tmp_path / "seer", loud=False), **options))
    difference = credited(learner, context)[2]["ppo/logp_difference"]
    assert difference < (1e-5 if precision == "fp32" else 0.05)


# -------------------------------------------------------------------------------------------------------- what is refused


def test_models_without_eyes_are_refused(tmp_path: Path) -> None:
    blind, seer = tiny_gpt2(tmp_path / "gpt2"), tiny_seer(tmp_path / "seer")
    with pytest.raises(ConfigError, match=r"prompts\.source\.kind='questions': asks about .* a gpt2 policy"):
        started(quiz_run(tmp_path, blind))
    other = tiny_seer(tmp_path / "other", language="gpt2", fusion="cross_attention")
    with pytest.raises(ConfigError, match=r"policy\.source=.*fusion=cross_attention\), which PPO needs"):
        open_language_model(str(other), "policy.source")
    learner, context = started(quiz_run(tmp_path, seer, **{"reference.source": str(blind)}))
    with pytest.raises(ConfigError, match="sees no pictures, but the policy does"):
        credited(learner, context)
    with pytest.raises(ValueError, match=r"prompts\.template='Say {}': questions about pictures wear"):
        quiz_run(tmp_path, seer, **{"prompts.template": "Say {}"})


def test_a_question_of_several_pictures_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_quiz(tmp_path / "quiz")
    config = quiz_run(tmp_path, tmp_path)
    entries = json.loads((folder / "train.json").read_text())
    del entries[5]["image"]
    entries[5]["conversations"][0]["value"] = QUESTION
    (folder / "train.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"dialogue '.*5.*': has 0 pictures, a prompt has one; leave it out"):
        open_prompts(config.prompts, "train")


def test_an_unreadable_picture_is_named_and_others_are_remembered(tmp_path: Path) -> None:
    config = quiz_run(tmp_path, tmp_path)
    language = open_language_model(str(tiny_seer(tmp_path / "seer")), "policy.source")
    prompts = open_prompts(config.prompts, "train")
    reader = PromptReader(config.prompts, language)
    first = reader.pixels(prompts[:4])
    for file in (tmp_path / "quiz/pictures").iterdir():
        file.write_bytes(b"no picture")
    assert first is not None
    again = reader.pixels(prompts[:4])
    assert again is not None
    assert torch.equal(again, first)
    key = prompts[9].dialogue.pictures[0]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=rf"{key}: is not a PNG"):
        reader.pixels(prompts[9:10])


def test_a_question_longer_than_its_model_was_made_for_is_refused_by_name(tmp_path: Path) -> None:
    seer = tiny_seer(tmp_path / "seer", max_tokens=50)
    reader = PromptReader(quiz_run(tmp_path, seer).prompts, open_language_model(str(seer), "policy.source"))
    prompt = open_prompts(reader.config, "test")[0]
    long = Dialogue("long", ("1.png",), (Turn(("", "what is it? " * 20), "red"),))
    assert len(reader.ids(prompt)) <= 50
    with pytest.raises(
        DataError, match=r"dialogue 'long': its question and pictures take .* the limit is 50"
    ):
        reader.ids(replace(prompt, dialogue=long))


def test_prompts_of_text_go_to_a_seer_too(tmp_path: Path) -> None:
    """Pictures are absent, and nothing else changes."""
    learner, context = started(story_run(tmp_path, tiny_seer(tmp_path / "seer")))
    judged, batch, metrics = credited(learner, context)
    assert judged.rollouts.pixels_BCHW is None
    assert judged.rollouts.pictures is None
    assert judged.rollouts.answers is None
    assert metrics["ppo/logp_difference"] < 1e-5
    learn(batch, learner, 0, context)


def test_held_out_questions_are_a_sample_of_their_split(tmp_path: Path) -> None:
    """Neighbours in a file are often about one picture: their order is drawn, the same in every process."""
    config = quiz_run(tmp_path, tmp_path).prompts
    prompts = open_prompts(config, "test")
    keys = [str(prompt.picture) for prompt in prompts]
    assert sorted(keys) == sorted(f"{24 + n}.png" for n in range(24))
    assert keys != [f"{24 + n}.png" for n in range(24)]
    assert open_prompts(config, "test") == prompts
    assert [p.index for p in open_prompts(config.replace(max_prompts=5), "test")] == list(range(5))
