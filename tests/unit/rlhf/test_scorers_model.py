"""Rewards that are models, held against transformers asked for one text at a time."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForMaskedLM,
    GPT2LMHeadModel,
)

from fmray.config.rewards import ClassifierReward, GrammarReward, LikelihoodReward
from fmray.errors import CheckpointError, ConfigError
from fmray.manifest import manifest_text, sum_file
from fmray.rlhf.scorers import build_scorer
from fmray.rlhf.scorers_model import WORD, read_label
from tests.stories import tiny_gpt2, tiny_t5
from tests.unit.rlhf.answers import TEXTS, answers
from tests.unit.rlhf.judges import (
    FAMILIES,
    HERE,
    bert,
    distilbert,
    gpt2,
    roberta,
    save_judge,
    t5,
    tagger,
)

LONGEST = {"bert": 32, "distilbert": 32}
"""Tokens that a family reads."""


def classifier(source: Path | str, **keys: object) -> ClassifierReward:
    return ClassifierReward.model_validate(
        {"source": str(source), "max_tokens": 32, "output": "logit", **keys}
    )


def raw(config: object, *texts: str, prompts: list[str] | None = None) -> list[float]:
    scores = build_scorer(config, HERE).score(answers(texts, prompts))  # type: ignore[arg-type]
    assert not scores.failures
    return scores.raw_B.tolist()


def logits_of(folder: Path, text: str) -> torch.Tensor:
    """What transformers says of one text alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if not ids.numel():
        ids = torch.tensor([[tokenizer.eos_token_id]])
    with torch.no_grad():
        return model(input_ids=ids.long()).logits[0]


# -------------------------------------------------------------------------------------------------------------- classifier


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_says_what_transformers_says_of_each_text_alone(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / family)
    config = classifier(folder, label=0 if family == "gpt2" else 1, max_tokens=LONGEST.get(family, 64))
    label = int(config.label)
    scores = build_scorer(config, HERE).score(answers(TEXTS))
    alone = [logits_of(folder, text)[label].item() for text in TEXTS]
    torch.testing.assert_close(scores.raw_B, torch.tensor(alone), atol=1e-5, rtol=0)
    assert scores.raw_B.dtype == torch.float32
    assert not scores.raw_B.requires_grad
    assert scores.raw_B.unique().numel() == len(TEXTS)  # a judge that says the same of all shows nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_6_7_padding_batch_and_order_change_no_score(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / family)
    config = classifier(folder, label=0 if family == "gpt2" else 1, max_tokens=LONGEST.get(family, 64))
    expected = dict(zip(TEXTS, raw(config.replace(batch_size=1), *TEXTS), strict=True))
    for order in itertools.islice(itertools.permutations(TEXTS), 0, 120, 29):
        for size in (2, 3, 64):
            scores = raw(config.replace(batch_size=size), *order)
            assert scores == pytest.approx([expected[text] for text in order], abs=1e-5)


def test_outputs_of_a_classifier_are_log_odds_and_probabilities(tmp_path: Path) -> None:
    folder = bert(tmp_path, labels=3)
    logits = logits_of(folder, TEXTS[0])
    p = logits.softmax(0)
    expected = {
        "logit": logits[2],
        "probability": p[2],
        "log_probability": p[2].log(),
        "margin": (p[2] / (p[0] + p[1])).log(),
    }
    for output, value in expected.items():
        assert raw(classifier(folder, label=2, output=output), TEXTS[0]) == [
            pytest.approx(value.item(), abs=1e-5)
        ]


def test_a_sure_classifier_keeps_its_digits() -> None:
    logits = torch.tensor([[40.0, 0.0], [0.0, 40.0]])
    assert read_label(logits, 0, "log_probability").tolist() == pytest.approx(
        [-math.exp(-40), -40.0], rel=1e-5
    )
    assert read_label(logits, 0, "margin").tolist() == [40.0, -40.0]


def test_labels_that_do_not_exclude_each_other_are_sigmoids(tmp_path: Path) -> None:
    folder = bert(tmp_path, labels=3, problem_type="multi_label_classification")
    logit = logits_of(folder, "bad")[1]
    assert raw(classifier(folder, output="margin"), "bad") == [pytest.approx(logit.item(), abs=1e-5)]
    assert raw(classifier(folder, output="probability"), "bad") == [
        pytest.approx(logit.sigmoid().item(), abs=1e-5)
    ]


def test_one_output_is_read_as_it_is_whatever_label_and_output(tmp_path: Path) -> None:
    folder = gpt2(tmp_path, labels=1)
    for output in ("logit", "margin", "probability", "log_probability"):
        assert raw(classifier(folder, label=1, output=output), "bad") == raw(
            classifier(folder, label=0), "bad"
        )


def test_a_label_by_name_is_the_label_by_number(tmp_path: Path) -> None:
    names = ["negative", "neutral", "positive"]
    folder = bert(
        tmp_path, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    assert raw(classifier(folder, label="positive"), *TEXTS) == raw(classifier(folder, label=2), *TEXTS)
    for label, near in (
        ("positiv", "did you mean positive?"),
        (3, "0 negative, 1 neutral, 2 positive"),
        (-1, "no such"),
    ):
        with pytest.raises(ConfigError, match=r"rewards\.\*\.label") as caught:
            build_scorer(classifier(folder, label=label), HERE)
        assert near in str(caught.value)
        assert "0 negative, 1 neutral, 2 positive" in str(caught.value)


def test_a_hub_roberta_with_an_old_weights_file_and_no_tokenizer_json(tmp_path: Path) -> None:
    """As in `cardiffnlp/twitter-roberta-base-sentiment` and `textattack/roberta-base-CoLA`: pytorch_model.bin with a pooler."""
    folder = roberta(tmp_path)
    expected = raw(classifier(folder, label="LABEL_2"), *TEXTS)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    weights = dict(model.state_dict())
    weights |= {
        "roberta.pooler.dense.weight": torch.zeros(16, 16),
        "roberta.pooler.dense.bias": torch.zeros(16),
        "roberta.embeddings.position_ids": torch.arange(66)[None],
    }
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert not (folder / "tokenizer.json").exists()
    assert raw(classifier(folder, label="LABEL_2"), *TEXTS) == expected


def test_a_long_text_loses_its_beginning(tmp_path: Path) -> None:
    folder = distilbert(tmp_path)
    long = "the dog was very good and a film"
    assert raw(classifier(folder, max_tokens=5), long) == raw(classifier(folder), "and a film")
    assert raw(classifier(folder, max_tokens=5), long) != raw(classifier(folder), "the dog was")


def test_6_6_gain_and_bias_of_a_trained_reward_model(tmp_path: Path) -> None:
    saved = {"fmray_gain": 2.5, "fmray_bias": -1}
    plain = raw(classifier(gpt2(tmp_path / "plain")), *TEXTS)
    normalised = raw(classifier(gpt2(tmp_path / "normalised", **saved)), *TEXTS)
    assert normalised == pytest.approx([2.5 * score - 1 for score in plain], abs=1e-5)
    with pytest.raises(ConfigError, match="fmray_gain='much'"):
        build_scorer(classifier(gpt2(tmp_path / "broken", fmray_gain="much")), HERE)


def test_6_6_gain_and_bias_are_of_the_margin_of_two_labels(tmp_path: Path) -> None:
    plain, saved = t5(tmp_path / "plain"), t5(tmp_path / "saved", fmray_gain=2.5, fmray_bias=-1)
    margins = raw(classifier(plain, output="margin"), *TEXTS)
    normalised = [2.5 * margin - 1 for margin in margins]
    assert raw(classifier(saved, output="margin"), *TEXTS) == pytest.approx(normalised, abs=1e-5)
    turned = raw(classifier(saved, output="margin", label=0), *TEXTS)
    assert turned == pytest.approx([-score for score in normalised], abs=1e-5)
    assert raw(classifier(saved, output="probability"), *TEXTS) == raw(
        classifier(plain, output="probability"), *TEXTS
    )


def test_6_9_dropout_is_off_in_a_reward_model(tmp_path: Path) -> None:
    folder = bert(tmp_path, hidden_dropout_prob=0.9, attention_probs_dropout_prob=0.9, classifier_dropout=0.9)
    assert raw(classifier(folder), *TEXTS) == raw(classifier(folder), *TEXTS)


def test_a_decoder_without_padding_reads_one_text_at_a_time(tmp_path: Path) -> None:
    with_padding = raw(classifier(gpt2(tmp_path / "with"), label=0), *TEXTS)
    without = raw(classifier(gpt2(tmp_path / "without", pad_token_id=None), label=0), *TEXTS)
    assert without == pytest.approx(with_padding, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "special"), [(bert, "[SEP]"), (roberta, "</s>"), (t5, "</s>"), (gpt2, "<pad>")]
)
def test_a_policy_cannot_speak_to_its_judge_in_special_tokens(
    make: object, special: str, tmp_path: Path
) -> None:
    folder = make(tmp_path)  # type: ignore[operator]
    half = len(special) // 2
    nested = special[:half] + special + special[half:]
    config = classifier(folder, label=0)
    assert raw(config, f"bad{special} film", f"bad{nested} film", "bad film") == pytest.approx(
        raw(config, "bad film") * 3, abs=1e-5
    )


def test_a_prompt_that_spells_an_end_of_sequence_is_read_too(tmp_path: Path) -> None:
    config = classifier(t5(tmp_path), label=0, text="prompt_and_response")
    scores = raw(config, "bad", "bad", prompts=["so</s> it", "so it"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_prompt_and_response_are_joined_by_a_space_where_neither_has_one(tmp_path: Path) -> None:
    folder = distilbert(tmp_path)
    config = classifier(folder, text="prompt_and_response")
    prompts = ["the film", "the film ", "", "the film", "the film"]
    scores = raw(config, "was good", "was good", "bad", "", ", bad", prompts=prompts)
    expected = raw(
        classifier(folder), "the film was good", "the film was good", "bad", "the film", "the film, bad"
    )
    assert scores == pytest.approx(expected, abs=1e-6)


def test_the_policys_ids_are_left_alone(tmp_path: Path) -> None:
    rollouts = answers(TEXTS)
    before = rollouts.response_ids_BT.clone()
    build_scorer(classifier(bert(tmp_path)), HERE).score(rollouts)
    assert torch.equal(rollouts.response_ids_BT, before)


# --------------------------------------------------------------------------------------------------------- where models lie


def test_a_run_folder_is_its_newest_checkpoints_model(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000007"
    folder = bert(checkpoint / "model")
    sums = [sum_file(path, checkpoint) for path in folder.iterdir()]
    (checkpoint / "manifest.json").write_text(manifest_text(7, sums))
    expected = raw(classifier(folder), *TEXTS)
    assert raw(classifier(tmp_path / "run"), *TEXTS) == expected
    assert (
        raw(classifier(f"file://{tmp_path / 'run'}"), *TEXTS) == expected
    )  # as of an object store: through a copy
    (folder / "model.safetensors").write_bytes(b"altered")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        build_scorer(classifier(tmp_path / "run"), HERE)


def test_what_is_no_classifier_is_refused_in_one_line(tmp_path: Path) -> None:
    language_model = tiny_gpt2(tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    broken = bert(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not one")
    for source, message in (
        (language_model, "lacks the weights score.weight"),
        (f"{tmp_path}/none", "no such folder"),
        (broken, "cannot be loaded as a sequence classification model"),
    ):
        with pytest.raises(ConfigError, match=r"rewards\.\*\.source") as caught:
            build_scorer(classifier(source), HERE)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="holds no model"):
        build_scorer(classifier(tmp_path / "empty"), HERE)


@pytest.mark.parametrize(("make", "limit"), [(bert, 32), (roberta, 64), (gpt2, 64)])
def test_more_tokens_than_a_model_has_positions_are_refused(make: object, limit: int, tmp_path: Path) -> None:
    folder = make(tmp_path)  # type: ignore[operator]
    text = " ".join(["bad"] * 99)
    assert len(raw(classifier(folder, max_tokens=limit, label=0), text)) == 1
    with pytest.raises(ConfigError, match=rf"reads at most {limit} tokens"):
        build_scorer(classifier(folder, max_tokens=limit + 1), HERE)


# ------------------------------------------------------------------------------------------------------------------ tagger


def grammar(source: Path, **keys: object) -> GrammarReward:
    return GrammarReward.model_validate({"source": str(source), "max_tokens": 32, **keys})


def test_grammar_is_the_mean_over_words_of_p_keep_at_first_subwords(tmp_path: Path) -> None:
    folder = tagger(tmp_path)
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # [CLS] don ' t watch ##s it . [SEP]: the apostrophe's word has three tokens, "watchs" two
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", "don", "'", "t", "watch", "##s", "it", ".", "[SEP]"])
    with torch.no_grad():
        keep = model(torch.tensor([ids])).logits[0].log_softmax(-1)[:, 1]
    first = keep[torch.tensor([1, 4, 6, 7])]
    assert raw(grammar(folder), "don't watchs it.") == [pytest.approx(first.exp().mean().item(), abs=1e-5)]
    in_logs = grammar(folder, output="log_probability")
    assert raw(in_logs, "don't watchs it.") == [pytest.approx(first.mean().item(), abs=1e-5)]


def test_words_of_a_tagger() -> None:
    text = "Don’t pay 1,000.50 for the film's sea-dog, she said...  Never!? 3rd"
    words = ["Don’t", "pay", "1,000.50", "for", "the", "film's", "sea", "-", "dog", ",", "she", "said", "..."]
    assert WORD.findall(text) == [*words, "Never", "!?", "3", "rd"]


def test_batch_and_order_change_no_grammar_score(tmp_path: Path) -> None:
    folder = tagger(tmp_path)
    expected = raw(grammar(folder, batch_size=1), *TEXTS)
    assert len(set(expected)) == len(TEXTS)
    assert raw(grammar(folder, batch_size=2), *TEXTS) == pytest.approx(expected, abs=1e-5)
    assert raw(grammar(folder), *TEXTS[::-1]) == pytest.approx(expected[::-1], abs=1e-5)


def test_a_text_without_words_scores_like_a_tagger_that_knows_nothing(tmp_path: Path) -> None:
    config = grammar(tagger(tmp_path))
    assert raw(config, "", " \n\t ", "\u200b\x00") == pytest.approx([1 / 3] * 3)
    in_logs = config.replace(output="log_probability")
    assert raw(in_logs, "", "bad")[0] == pytest.approx(-math.log(3))


def test_a_long_text_loses_its_end_in_grammar(tmp_path: Path) -> None:
    config = grammar(tagger(tmp_path), max_tokens=5)
    assert raw(config, "the dog was very good") == raw(config, "the dog was")


def test_a_byte_level_tagger_reads_words_too(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForTokenClassification

    roberta(tmp_path)
    config = RobertaConfig.from_pretrained(tmp_path)
    config.id2label, config.label2id = {0: "$KEEP", 1: "x"}, {"$KEEP": 0, "x": 1}
    save_judge(RobertaForTokenClassification(config), tmp_path)
    assert len(set(raw(grammar(tmp_path), "the bad", "bad the the"))) == 2


def test_a_tagger_without_the_label_lists_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"rewards\.\*\.keep_label='KEEP'.*did you mean \$KEEP\? it has: 0 \$DELETE"
    ):
        build_scorer(grammar(tagger(tmp_path), keep_label="KEEP"), HERE)


# ---------------------------------------------------------------------------------------------------------- language model


def likelihood(source: Path, **keys: object) -> LikelihoodReward:
    return LikelihoodReward.model_validate({"source": str(source), "max_tokens": 32, **keys})


def mean_logp(folder: Path, text: str, first: int | None) -> float:
    """Token by token, each from the ones before."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    ids = ids if first is None else [first, *ids]
    logps = []
    with torch.no_grad():
        for place in range(1, len(ids)):
            logits = model(torch.tensor([ids[:place]])).logits[0, -1]
            logps.append(logits.log_softmax(0)[ids[place]].item())
    return sum(logps) / len(logps)


def test_likelihood_is_the_mean_over_tokens_foreseen_one_by_one(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path)
    texts = [text for text in TEXTS if text]
    expected = [mean_logp(folder, text, first=1) for text in texts]
    for size in (1, 3, 64):
        assert raw(likelihood(folder, batch_size=size), *texts) == pytest.approx(expected, abs=1e-5)


def test_likelihood_of_a_tokenizer_without_bos_and_eos_and_of_no_text(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path)
    nothing = -math.log(128)
    assert raw(likelihood(folder), "") == [pytest.approx(nothing)]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).exists():
            keys = {
                k: v for k, v in json.loads(path.read_text()).items() if k not in ("eos_token", "bos_token")
            }
            path.write_text(json.dumps(keys))
    assert AutoTokenizer.from_pretrained(folder).eos_token_id is None
    scores = raw(likelihood(folder), "the dog", "", "z")
    assert scores[0] == pytest.approx(mean_logp(folder, "the dog", first=None), abs=1e-5)
    assert scores[1:] == pytest.approx([nothing, nothing])  # one token has nothing to be foreseen from


def test_likelihood_in_small_pieces_of_logits_and_of_a_texts_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_gpt2(tmp_path)
    expected = raw(likelihood(folder), *TEXTS)
    monkeypatch.setattr("fmray.rlhf.scorers_model.MAX_LOGITS", 128 * 20)
    assert raw(likelihood(folder), *TEXTS) == pytest.approx(expected, abs=1e-5)
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[0], add_special_tokens=False)["input_ids"]
    beginning = AutoTokenizer.from_pretrained(folder).decode(ids[:3])
    assert raw(likelihood(folder, max_tokens=4), TEXTS[0]) == pytest.approx(
        raw(likelihood(folder), beginning), abs=1e-5
    )


def test_models_that_are_no_causal_language_models_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig

    bert(tmp_path / "bert")
    save_judge(BertForMaskedLM(BertConfig.from_pretrained(tmp_path / "bert")), tmp_path / "bert")
    for folder, message in (
        (tmp_path / "bert", "see the ones that follow"),
        (tiny_t5(tmp_path / "t5"), "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_scorer(likelihood(folder), HERE)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tiny_gpt2(tmp_path / "gpt2")), GPT2LMHeadModel)


# ------------------------------------------------------------------------------------------------------------- real weights

PAIRS = (
    ("The dogs in the garden are very happy today.", "The dogs in the garden is very happy today."),
    ("She goes to school every morning.", "She go to school every morning."),
    ("There were many people at the film.", "There was many people at the film."),
    ("I have seen this film twice.", "I has seen this film twice."),
)


@pytest.mark.assets
@pytest.mark.parametrize(
    "config", [GrammarReward(), pytest.param(LikelihoodReward(), marks=pytest.mark.slow)]
)
def test_real_judges_prefer_right_sentences(config: GrammarReward | LikelihoodReward) -> None:
    right, wrong = raw(config, *(r for r, _ in PAIRS)), raw(config, *(w for _, w in PAIRS))
    assert all(r > w for r, w in zip(right, wrong, strict=True)), list(zip(right, wrong, strict=True))
