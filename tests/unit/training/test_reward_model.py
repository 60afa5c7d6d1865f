"""Reward models from the inside: how they start, what must not change a score, engines and ranks as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fmray.config.loading import validate
from fmray.config.reward import RewardModelConfig
from fmray.config.rewards import ClassifierReward
from fmray.data.text_batches import collate, token_rows
from fmray.data.verdicts import Verdict, joined, open_verdicts
from fmray.errors import ConfigError, DataError
from fmray.evaluation.verdicts import score_tokens
from fmray.models.reward_model import (
    Scorer,
    build_reward_model,
    is_decoder_only,
    is_head,
    learning_groups,
    load_reward_model,
    scores_of,
)
from fmray.objectives.preference import all_pairs, classification, pairwise, plackett_luce
from fmray.rlhf.scorers_model import ClassifierScorer
from fmray.runtime.context import WorkerContext
from fmray.runtime.run_folder import RunFolder
from fmray.training.engine import rates_at
from fmray.training.reward_model import (
    exported,
    judged_right,
    learn,
    make_learner,
    make_loader,
    saver,
    verdict_loss,
    write_scale,
)
from tests.opinions import TINY, opinion_run
from tests.stories import tiny_gpt2, tiny_llama, tiny_t5
from tests.unit.rlhf.answers import answers
from tests.workers import run_workers

DISTILBERT = {"vocab_size": 128, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
SAVED: dict[str, Callable[[Path], Path]] = {"t5": tiny_t5, "gpt2": tiny_gpt2, "llama": tiny_llama}
FAMILIES = pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "gpt2", "llama"])


def configured(folder: Path, kind: str = "pairs", family: str = "bert", **changes: Any) -> RewardModelConfig:
    if family in SAVED:
        source = folder / family
        if not source.exists():
            SAVED[family](source)
        model: dict[str, Any] = {
            "source": str(source),
            "tokenizer": None,
            "pretrained": True,
            "overrides": {},
        }
    else:
        overrides = {**TINY} if family == "bert" else {**DISTILBERT, "max_position_embeddings": 64}
        model = {"source": f"arch:{family}", "overrides": overrides}
    keys = {f"model__{key}": value for key, value in model.items()}
    return validate(RewardModelConfig, opinion_run(folder, kind, **{**keys, **changes}))


def here(folder: Path | str = "unused", rank: int = 0, world: int = 1) -> WorkerContext:
    return WorkerContext(rank, world, torch.device("cpu"), RunFolder(str(folder)))


def scorer_of(config: RewardModelConfig, labels: tuple[str, ...] = ()) -> Scorer:
    torch.manual_seed(config.run.seed)
    return build_reward_model(config.model, labels)


# ------------------------------------------------------------------------------------------------------- how it starts


@FAMILIES
def test_6_5_a_score_head_starts_at_variance_one_over_width_plus_one(tmp_path: Path, family: str) -> None:
    heads, biases = [], []
    for seed in range(24):
        model = scorer_of(configured(tmp_path, family=family, run__seed=seed)).model
        layer = [
            layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer.out_features == 1 and is_head(model, f"{name}.weight")
        ][-1]
        heads.append(layer.weight.detach().flatten())
        biases += [] if layer.bias is None else layer.bias.tolist()
    drawn = torch.cat(heads)
    wanted = (layer.in_features + 1) ** -0.5
    assert float(drawn.std()) == pytest.approx(wanted, rel=0.12)
    assert abs(float(drawn.mean())) < 4 * wanted / len(drawn) ** 0.5
    assert set(biases) <= {0.0}


@FAMILIES
def test_6_9_dropout_is_off_unless_asked_for(tmp_path: Path, family: str) -> None:
    config = configured(tmp_path, family=family)
    for dropout, alike in ((0.0, True), (0.3, False)):
        scorer = scorer_of(config.replace(model=config.model.replace(dropout=dropout)))
        scorer.model.train()
        ids = torch.tensor(scorer.tokenize(["the dog likes the sea and music"]))
        mask = torch.ones_like(ids)
        found = [scorer.logits(ids, mask).item() for _ in range(3)]
        assert (len(set(found)) == 1) is alike


def test_labels_stand_in_the_configuration_and_a_head_of_the_same_labels_is_kept(tmp_path: Path) -> None:
    config = configured(tmp_path, "labelled", "gpt2")
    scorer = scorer_of(config, ("bad", "good"))
    assert scorer.model.config.id2label == {0: "bad", 1: "good"}
    assert scorer.model.config.label2id == {"bad": 0, "good": 1}
    saver(scorer)(tmp_path / "saved")
    again = config.model.replace(source=str(tmp_path / "saved"))
    assert torch.equal(
        build_reward_model(again, ("bad", "good")).model.score.weight, scorer.model.score.weight
    )
    other = build_reward_model(again, ("bad", "fair", "good"))
    assert other.model.score.weight.shape[0] == 3


def test_frozen_embeddings_are_left_out_and_the_head_has_its_own_rate(tmp_path: Path) -> None:
    config = configured(tmp_path, model__freeze_embeddings=True, model__head_lr=0.5)
    scorer = scorer_of(config)
    groups = learning_groups(scorer.model, config.model, 0.1, 0.2)
    embeddings = scorer.model.get_input_embeddings().weight
    assert not embeddings.requires_grad
    assert all(parameter is not embeddings for group in groups for parameter in group.parameters)
    told = {group.name: (group.lr, group.weight_decay) for group in groups}
    assert told == {
        "body": (0.1, 0.2),
        "body/no_decay": (0.1, 0.0),
        "head": (0.5, 0.2),
        "head/no_decay": (0.5, 0.0),
    }
    learned = sum(parameter.numel() for group in groups for parameter in group.parameters)
    assert learned + embeddings.numel() == sum(p.numel() for p in scorer.model.parameters())


def test_what_cannot_be_a_scorer_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.tokenizer=None: arch:bert brings none"):
        scorer_of(configured(tmp_path, model__tokenizer=None))
    with pytest.raises(ConfigError, match=r"model\.source='arch:vit'"):
        scorer_of(configured(tmp_path, model__source="arch:vit", model__overrides={}))
    with pytest.raises(ConfigError, match=r"bert has 64 positions"):
        scorer_of(configured(tmp_path, model__max_tokens=65))
    with pytest.raises(ConfigError, match=r"its tokenizer has \d+ tokens, the model 50"):
        scorer_of(configured(tmp_path, model__overrides={**TINY, "vocab_size": 50}))


def test_decoder_only_is_told_from_encoders(tmp_path: Path) -> None:
    found = {
        family: is_decoder_only(scorer_of(configured(tmp_path, family=family)).model.config)
        for family in ("bert", "distilbert", "t5", "gpt2", "llama")
    }
    assert found == {"bert": False, "distilbert": False, "t5": False, "gpt2": True, "llama": True}


# ------------------------------------------------------------------------------------- what must not change a score


@FAMILIES
@pytest.mark.parametrize("labels", [(), ("bad", "good")])
def test_6_7_padding_changes_no_score_on_either_side(
    tmp_path: Path, family: str, labels: tuple[str, ...]
) -> None:
    """Amount and side of the padding, fp32: 1e-4 is the bar; each text alone is the reference."""
    scorer = scorer_of(configured(tmp_path, family=family), labels)
    scorer.model.eval()
    texts = scorer.tokenize(["the dog likes the sea", "a cat", "my old friend remembers a long story"])
    pad = scorer.tokenizer.pad_token_id
    with torch.no_grad():
        alone = torch.cat(
            [scorer.logits(torch.tensor([row]), torch.ones(1, len(row)).long()) for row in texts]
        )
        for extra in (0, 1, 17):
            width = max(map(len, texts)) + extra
            for left in (True, False):
                gaps = [[pad] * (width - len(row)) for row in texts]
                ids = [gap + row if left else row + gap for gap, row in zip(gaps, texts, strict=True)]
                ones = [[1] * len(row) for row in texts]
                zeros = [[0] * len(gap) for gap in gaps]
                mask = [zero + one if left else one + zero for zero, one in zip(zeros, ones, strict=True)]
                padded = scorer.logits(torch.tensor(ids), torch.tensor(mask))
                assert float((padded - alone).abs().max()) <= 1e-4, (extra, left)


def test_an_encoder_decoder_reads_a_text_that_spells_its_end(tmp_path: Path) -> None:
    scorer = scorer_of(configured(tmp_path, family="t5"))
    rows = scorer.tokenize(["the dog</s> likes</s>", "a cat"])
    assert [row.count(scorer.model.config.eos_token_id) for row in rows] == [1, 1]
    assert torch.isfinite(score_tokens(scorer, rows, 2, here())).all()


def test_long_texts_lose_their_beginning(tmp_path: Path) -> None:
    text = "the dog likes the sea and a cat hates winter"
    whole = scorer_of(configured(tmp_path, model__max_tokens=64)).tokenize([text])[0]
    cut = scorer_of(configured(tmp_path, model__max_tokens=6)).tokenize([text])[0]
    assert len(cut) == 6 < len(whole)
    assert cut == whole[-6:]


# ------------------------------------------------------------------------------------------------------------ learning


def test_the_loss_is_the_configured_one(tmp_path: Path) -> None:
    verdicts = [Verdict(("a", "bb")), Verdict(("ccc", "d"), margin=0.75)]
    rows = token_rows(verdicts, lambda texts: [[1] * len(text) for text in texts])
    batch = collate(verdicts, rows, pad_id=0, margin=0.25)
    logits = torch.tensor([[1.0], [0.5], [-1.0], [2.0]])
    scores = logits.view(2, 2)
    wanted = {
        "pairwise": pairwise(scores[:, 0], scores[:, 1], torch.tensor([0.25, 0.75])),
        "all_pairs": all_pairs(scores, margin_B=torch.tensor([0.25, 0.75])),
        "plackett_luce": plackett_luce(scores),
    }
    for kind, expected in wanted.items():
        config = configured(tmp_path, objective={"kind": kind})
        assert torch.isclose(verdict_loss(logits, batch, config), expected), kind
    assert judged_right(logits, batch, "pairwise") == (1.0, 2)
    labelled = collate([Verdict(("a",), label=1)], [([1],)], 0, 0.0)
    config = configured(tmp_path, "labelled", objective={"label_smoothing": 0.2})
    one = torch.tensor([[0.5, 1.5]])
    expected = classification(one, torch.tensor([1]), label_smoothing=0.2)
    assert torch.isclose(verdict_loss(one, labelled, config), expected)


def some_steps(config: RewardModelConfig, context: WorkerContext, steps: int = 4) -> dict[str, Any]:
    """Losses, gradient norms and whole weights of a few steps."""
    torch.manual_seed(config.run.seed)
    verdicts = open_verdicts(config.data)
    scorer = build_reward_model(config.model, verdicts.labels)
    learner = make_learner(config, scorer, context)
    loader = make_loader(config, scorer, verdicts, context)
    losses, norms = [], []
    for step in range(steps):
        learned = learn(learner, loader.batches(step), config, context, step)
        losses.append(learned.over_ranks(context, 1.0)["train/loss"])
        norms.append(learner.engine.step(rates_at(learner.groups, config.optimizer, step, steps)))
    weights = {name: tensors["weight"] for name, tensors in learner.engine.tensors()}
    return {"losses": losses, "norms": norms, "weights": weights}


def assert_alike(found: dict[str, Any], expected: dict[str, Any], tolerance: float, case: object) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance), case
    assert found["norms"] == pytest.approx(expected["norms"], rel=10 * tolerance), case
    far = {
        name: float((found["weights"][name] - weight).abs().max())
        for name, weight in expected["weights"].items()
    }
    assert max(far.values()) <= 2 * tolerance, (case, max(far, key=lambda name: far[name]))


@pytest.mark.parametrize("kind", ["labelled", "pairs", "rankings"])
def test_micro_batches_change_nothing(tmp_path: Path, kind: str) -> None:
    smooth = {"optimizer": {"lr": 3e-3, "eps": 1e-4}}  # Adam divides by eps where a gradient is tiny
    whole = some_steps(configured(tmp_path, kind, **smooth), here())
    for size in (1, 2, 4):
        parts = some_steps(configured(tmp_path, kind, data__micro_batch_size=size, **smooth), here())
        assert_alike(parts, whole, 1e-5, size)


def on_a_rank(
    rank: int, world: int, folder: str, kinds: list[str], stages: list[int | None]
) -> dict[str, Any]:
    found = {}
    for kind in kinds:
        for stage in stages:
            engine = {"kind": "torch"} if stage is None else {"kind": "deepspeed", "zero_stage": stage}
            keys: dict[str, Any] = {
                "engine": engine,
                "optimizer": {"lr": 3e-3, "eps": 1e-4},
                "data__micro_batch_size": 2,
                "model__freeze_embeddings": True,
            }
            config = configured(Path(folder), kind, **keys)
            found[f"{kind}/{stage}"] = some_steps(config, here(rank=rank, world=world))
    return found


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("world", [1, 2])
def test_engines_stages_and_ranks_are_one_arithmetic(tmp_path: Path, world: int) -> None:
    kinds, stages = ["labelled", "rankings"], [None, 0, 1, 2, 3]
    reference = on_a_rank(0, 1, str(tmp_path), kinds, [None])
    for ranks in run_workers(world, on_a_rank, str(tmp_path), kinds, stages):
        for case, found in ranks.items():
            assert_alike(found, reference[f"{case.split('/')[0]}/None"], 1e-4, case)


# -------------------------------------------------------------------------------------------------------- what comes out


def taught(tmp_path: Path, kind: str, family: str, **changes: Any) -> tuple[Scorer, RewardModelConfig]:
    config = configured(tmp_path, kind, family, **changes)
    torch.manual_seed(0)
    verdicts = open_verdicts(config.data)
    learner = make_learner(config, build_reward_model(config.model, verdicts.labels), here())
    loader = make_loader(config, learner.scorer, verdicts, here())
    for step in range(3):
        learn(learner, loader.batches(step), config, here(), step)
        learner.engine.step([1e-3] * len(learner.groups))
        if learner.average is not None:
            learner.average.update(step)
    return exported(learner, verdicts, config, here()), config


@FAMILIES
def test_a_saved_folder_is_the_model_that_was_trained(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForSequenceClassification

    scorer, _ = taught(tmp_path, "pairs", family)
    saver(scorer)(tmp_path / "saved")
    loaded = load_reward_model(str(tmp_path / "saved"), torch.device("cpu"))
    texts = scorer.tokenize(["the dog likes the sea", "a cat"])
    for name, weight in scorer.model.state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name]), name
    before, after = (score_tokens(each, texts, 2, here()) for each in (scorer, loaded))
    assert torch.allclose(before, after, atol=1e-6)  # where the weights lie in memory moves the last bit
    assert loaded.tokenizer.truncation_side == "left"
    assert loaded.max_tokens == 32
    plain, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert plain.config.id2label == {0: "reward"}


@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_6_6_gain_and_bias_make_the_training_texts_zero_and_one(tmp_path: Path, kind: str) -> None:
    scorer, config = taught(tmp_path, kind, "bert", normalize={"max_texts": 10_000})
    texts = [text for verdict in open_verdicts(config.data).train for text in verdict.texts]
    scores = scores_of(score_tokens(scorer, scorer.tokenize(texts), 8, here()))
    normal = scorer.model.config.fmray_gain * scores.double() + scorer.model.config.fmray_bias
    assert float(normal.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(normal.std(correction=0)) == pytest.approx(1.0, abs=1e-5)


def test_normalisation_is_off_for_labels_and_can_be_taken_from_other_texts(tmp_path: Path) -> None:
    scorer, _ = taught(tmp_path, "labelled", "bert")
    assert not hasattr(scorer.model.config, "fmray_gain")
    (tmp_path / "texts.jsonl").write_text('{"text": "the dog"}\n{"text": "winter and music"}\n')
    told = {"on": True, "texts": str(tmp_path / "texts.jsonl")}
    scorer, _ = taught(tmp_path, "labelled", "bert", normalize=told)
    margins = scores_of(score_tokens(scorer, scorer.tokenize(["the dog", "winter and music"]), 2, here()))
    normal = scorer.model.config.fmray_gain * margins + scorer.model.config.fmray_bias
    assert sorted(normal.tolist()) == pytest.approx([-1.0, 1.0], abs=1e-4)


@FAMILIES
def test_the_reward_bank_reads_the_normalised_score(tmp_path: Path, family: str) -> None:
    """What PPO's classifier reward says of an answer is gain · score + bias of the folder that was saved here."""
    scorer, _ = taught(tmp_path, "pairs", family)
    saver(scorer)(tmp_path / "saved")
    responses = ("likes the sea", "hates")
    rollouts = answers(responses, prompts=("the dog", "a cat"))
    reward = ClassifierReward(source=str(tmp_path / "saved"), text="prompt_and_response", max_tokens=32)
    raw = ClassifierScorer(reward, torch.device("cpu")).score(rollouts).raw_B
    texts = [
        joined(prompt, response) for prompt, response in zip(("the dog", "a cat"), responses, strict=True)
    ]
    scores = scores_of(score_tokens(scorer, scorer.tokenize(texts), 2, here()))
    config = scorer.model.config
    assert torch.allclose(raw, config.fmray_gain * scores + config.fmray_bias, atol=1e-5)


def test_a_model_that_tells_nothing_apart_has_no_scale(tmp_path: Path) -> None:
    config = configured(tmp_path)
    scorer = scorer_of(config)
    nn.init.zeros_(scorer.model.classifier.weight)
    with pytest.raises(DataError, match="tells nothing apart"):
        write_scale(scorer, open_verdicts(config.data), config, here())


def test_the_average_of_the_weights_is_what_is_saved(tmp_path: Path) -> None:
    averaged, _ = taught(tmp_path, "pairs", "bert", optimizer__ema_decay=0.9)
    last, _ = taught(tmp_path, "pairs", "bert")
    assert not torch.allclose(averaged.model.classifier.weight, last.model.classifier.weight)
