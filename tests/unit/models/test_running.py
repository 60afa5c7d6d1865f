"""Answers that join and leave: the same as alone, whoever joins, leaves or fails beside them; memory that is given back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from fmray.errors import DataError
from fmray.models.answering import Answering, Said
from fmray.models.decoding import slots
from fmray.models.decoding.choice import AnswerOptions
from fmray.models.decoding.running import Asked, Running, Token
from fmray.types import Dialogue, Pictures, Turn
from tests import tiny_mllm, tiny_vqa

MOST = 10
"""Tokens of the longest answer here: more than the models' own limit, fewer than the VQA model's positions."""
KINDS = ("vqa", "vqa mean", "llama", "gpt2", "gated llama", "gated gpt2", "neox", "mistral")
EVERY = pytest.mark.parametrize("kind", KINDS)
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True)
PAIR = Dialogue("pair", ("0.png", "1.png"), (Turn(("", " beside ", "which?"), ""),))


def other_language(kind: str) -> PreTrainedModel:
    """Models without a decoder of ours: rotary with a parallel block, and one whose attention slides over eight tokens."""
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 512, "num_attention_heads": 4}
    if kind == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **ids))
    return MistralForCausalLM(MistralConfig(**shape, **ids, num_key_value_heads=2, sliding_window=8))


@cache
def world(kind: str) -> tuple[Any, tuple[Dialogue, ...], Pictures]:
    """A model, what it is asked, and all pictures of that."""
    if kind.startswith("vqa"):
        fusion: Any = "mean" if kind.endswith("mean") else "concat"
        return tiny_vqa.tiny_vqa(2, fusion), tuple(tiny_vqa.dialogues(8)), tiny_vqa.pictures()
    dialogues = (*tiny_mllm.some_dialogues(), PAIR)
    if kind in ("neox", "mistral"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_mllm, "tiny_language", other_language)
            return tiny_mllm.tiny_mllm(3, kind), dialogues, tiny_mllm.pictures(2)
    fusion = "cross_attention" if kind.startswith("gated") else "concat"
    answering = tiny_mllm.tiny_mllm(3, kind.split()[-1], fusion)
    return answering, dialogues, tiny_mllm.pictures(2)


@cache
def alone(kind: str, number: int, longest: int) -> Said:
    answering, dialogues, pictures = world(kind)
    (said,) = answering.answer([dialogues[number]], pictures, max_new_tokens=longest)
    return said  # type: ignore[no-any-return]


def asked(kind: str, number: int, options: AnswerOptions, key: object = None) -> Asked:
    _, dialogues, pictures = world(kind)
    return Asked(number if key is None else key, dialogues[number], pictures, options)


def answered(running: Running, some: Sequence[Asked]) -> dict[Any, list[Token]]:
    """All tokens of some answers, that join as soon as there is room."""
    waiting = list(some)
    told: dict[Any, list[Token]] = {each.key: [] for each in some}
    while waiting or running.rows:
        joining, waiting = waiting[: running.room], waiting[running.room :]
        for token in [*running.join(joining), *running.step()]:
            if token.key in told:
                told[token.key].append(token)
    return told


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


# -------------------------------------------------------------------------------------------------------- the same as alone


@EVERY
@EXAMPLES
@drawn(st.data())
def test_an_answer_is_the_same_whoever_joins_and_leaves_beside_it(kind: str, data: st.DataObject) -> None:
    answering, dialogues, _ = world(kind)
    running = answering.running(data.draw(st.integers(1, 5)))
    waiting = data.draw(st.permutations(range(len(dialogues))))
    longest = {number: data.draw(st.integers(1, MOST)) for number in waiting}
    texts: dict[Any, str] = dict.fromkeys(waiting, "")
    ended: dict[Any, Token] = {}
    running_now: set[Any] = set()
    while waiting or running.rows:
        count = data.draw(st.integers(0 if running.rows else 1, running.room)) if running.room else 0
        joining, waiting = waiting[:count], waiting[count:]
        tokens = running.join([asked(kind, number, AnswerOptions(longest[number])) for number in joining])
        assert [token.key for token in tokens] == joining
        running_now |= set(joining)
        for token in [*tokens, *running.step()]:
            texts[token.key] += token.text
            if token.finished:
                ended[token.key] = token
                running_now.remove(token.key)
        if running_now and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(running_now)))
            running.leave([gone, "nobody"])
            running_now.remove(gone)
            assert alone(kind, gone, longest[gone]).text.startswith(texts.pop(gone).rstrip())
        assert running.rows == len(running_now)
    for number, token in ended.items():
        expected = alone(kind, number, longest[number])
        assert token.said == expected
        assert token.finished == ("stop" if expected.ended else "length")
        assert texts[number] == expected.text
    assert running.bytes == running._pictures.bytes


@EVERY
def test_answers_differ_from_one_another(kind: str) -> None:
    """Else the tests here would show nothing."""
    _, dialogues, _ = world(kind)
    assert len({alone(kind, number, MOST).text for number in range(len(dialogues))}) > 1


@torch.no_grad()
def whole_pass(answering: Any, dialogue: Dialogue, pictures: Pictures, said: Sequence[int]) -> Tensor:
    """Log-probabilities at each token of an answer, [T, V], by one forward pass without any cache."""
    model = answering.model
    if not hasattr(answering, "renderer"):
        inputs = answering._asked([dialogue], pictures)
        words = torch.tensor([[model.config.start_id, *said[:-1]]])
        return model.eval()(**inputs, decoder_input_ids=words).logits[0].log_softmax(-1)  # type: ignore[no-any-return]
    spans = answering.renderer.spans(dialogue, answer=False)
    prompt = [token for span in spans for token in span.ids]
    inputs = {"input_ids": torch.tensor([[*prompt, *said[:-1]]])}
    keys, starts, place = [], [], 0
    for span in spans:
        if span.picture is not None:
            keys.append(span.picture)
            starts.append(place)
        place += len(span.ids)
    if keys:
        inputs["pixel_values"] = pictures.pixels_NCHW[pictures.rows(keys)]  # type: ignore[index]
        if model.config.fusion == "cross_attention":
            columns, order = torch.arange(inputs["input_ids"].shape[1]), torch.arange(len(keys))[None]
            inputs |= {"memory_pictures": order, "memory_group": order * 0, "memory_place": order}
            inputs["seen"] = torch.stack([columns >= start for start in starts]).sum(dim=0)[None]
    return model(**inputs).logits[0, len(prompt) - 1 :].log_softmax(-1)  # type: ignore[no-any-return]


@EVERY
def test_log_probabilities_are_those_of_a_whole_pass(kind: str) -> None:
    """Greedy and drawn, joined one after another: the chosen token's and its alternatives', of the undistorted distribution."""
    answering, dialogues, pictures = world(kind)
    wishes = [
        AnswerOptions(6, temperature=0.7 * (number % 2), top_p=0.8, seed=number, top_logprobs=number)
        for number in range(len(dialogues))
    ]
    told = answered(answering.running(3), [asked(kind, number, each) for number, each in enumerate(wishes)])
    for number, tokens in told.items():
        logp_TV = whole_pass(answering, dialogues[number], pictures, ids(tokens))
        for token, logp_V in zip(tokens, logp_TV, strict=True):
            assert token.spelled.logprob == pytest.approx(float(logp_V[token.id]), abs=1e-4)
            top = logp_V.topk(number).values.tolist()
            assert [each.logprob for each in token.alternatives] == pytest.approx(top, abs=1e-4)


@EVERY
@EXAMPLES
@drawn(st.data())
def test_a_drawn_answer_depends_on_its_seed_and_on_nobody(kind: str, data: st.DataObject) -> None:
    answering, dialogues, _ = world(kind)
    wishes = AnswerOptions(MOST, temperature=1.1, top_p=data.draw(st.sampled_from((0.3, 0.9, 1.0))), seed=7)
    number = data.draw(st.integers(0, len(dialogues) - 1))
    (by_itself,) = answered(answering.running(1), [asked(kind, number, wishes)]).values()
    others = [
        asked(kind, other, AnswerOptions(1 + other, temperature=0.5 * (other % 3), seed=other))
        for other in range(len(dialogues))
    ]
    place = data.draw(st.integers(0, len(others)))
    crowd = [*others[:place], asked(kind, number, wishes, key="it"), *others[place:]]
    among = answered(answering.running(data.draw(st.integers(2, 6))), crowd)["it"]
    assert ids(among) == ids(by_itself)
    assert among[-1].said == by_itself[-1].said


def test_another_seed_is_another_answer() -> None:
    options = [AnswerOptions(MOST, temperature=1.5, seed=seed) for seed in (0, 1, 2, 2**64 + 1, -1)]
    running = world("llama")[0].running(8)
    told = answered(running, [asked("llama", 0, each, key=place) for place, each in enumerate(options)])
    said = [ids(tokens) for tokens in told.values()]
    assert said[3] == said[1]  # modulo 2**64
    assert len({tuple(each) for each in said}) == 4


# ------------------------------------------------------------------------------------------------ who fails, fails alone


def too_long() -> Dialogue:
    return Dialogue("long", (), (Turn(("what color is it? " * 40,), ""),))


def test_a_question_that_cannot_be_read_is_named_and_nobody_has_joined() -> None:
    answering, dialogues, pictures = world("llama")
    running, options = answering.running(4), AnswerOptions(MOST)
    running.join([asked("llama", 0, options), asked("llama", 1, options)])
    for bad, says in (
        (
            Asked("bad", too_long(), pictures, options),
            r"^dialogue 'long': its question and pictures take \d+ ",
        ),
        (
            Asked("bad", dialogues[2], Pictures(()), options),
            r"^dialogue '0/2': its picture '0.png' was not given$",
        ),
        (
            asked("llama", 3, AnswerOptions(600), "bad"),
            r"^dialogue '1/0': max_new_tokens=600, but its answer can ",
        ),
    ):
        with pytest.raises(DataError, match=says):
            running.join([asked("llama", 4, options), bad])
        assert running.rows == 2
        running.step()
    with pytest.raises(ValueError, match=r"^3 answers cannot join 2 of 4, or a key is taken$"):
        running.join([asked("llama", number, options) for number in (3, 4, 5)])
    with pytest.raises(ValueError, match="a key is taken"):
        running.join([asked("llama", 3, options, key=1)])
    told = answered(running, [])
    assert not told
    assert running.rows == 0


def test_a_vqa_model_takes_one_question_about_one_picture() -> None:
    answering, dialogues, pictures = world("vqa")
    running = answering.running(2)
    two = Dialogue("two", (), (*dialogues[0].turns, *dialogues[1].turns))
    with pytest.raises(
        DataError, match=r"^dialogue 'two': the VQA model answers one question, it has 2 turns"
    ):
        running.join([Asked(0, two, pictures, AnswerOptions(4))])
    with pytest.raises(
        DataError, match=r"^dialogue '0': max_new_tokens=17, but its answer can have 1 to 16 "
    ):
        running.join([asked("vqa", 0, AnswerOptions(17))])
    assert running.rows == 0


def features(answering: Any, pictures: Pictures) -> Tensor:
    with torch.no_grad():
        return answering.picture_features(pictures.pixels_NCHW).clone()  # type: ignore[no-any-return]


@EVERY
def test_numbers_that_are_none_end_their_own_row_and_spoil_no_place(kind: str) -> None:
    """The broken row's place is taken by the last one, and by newcomers: nothing of it may reach them."""
    answering, dialogues, pictures = world(kind)
    broken = Pictures(pictures.keys, features_NPF=features(answering, pictures) * torch.nan)
    numbers = [number for number, dialogue in enumerate(dialogues) if dialogue.pictures]
    running, options = answering.running(4), AnswerOptions(MOST)
    first = running.join([asked(kind, number, options) for number in numbers[:2]])
    (failed, *_), told = (
        running.join(
            [Asked("broken", dialogues[numbers[0]], broken, options), asked(kind, numbers[2], options)]
        ),
        {token.key: [token] for token in first},
    )
    assert (failed.key, failed.finished, failed.said, failed.text) == ("broken", "failed", None, "")
    name = dialogues[numbers[0]].name
    assert str(failed.error) == f"dialogue '{name}': the model's numbers at answer token 0 are not finite"
    assert "broken" not in {token.key for token in running.step()}
    for key, tokens in answered(running, [asked(kind, number, options) for number in numbers[3:5]]).items():
        assert tokens[-1].said == alone(kind, key, MOST)
    assert told


@pytest.mark.parametrize("kind", ["vqa", "llama", "gated llama", "neox"])
def test_a_call_that_runs_out_of_memory_has_changed_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering, _, _ = world(kind)
    running, options = answering.running(8), AnswerOptions(MOST)
    told = {token.key: [token] for token in running.join([asked(kind, number, options) for number in (0, 1)])}
    decoder: Any = running._speaker.rows
    full = torch.OutOfMemoryError("out of memory")

    def fails(*_: Any, **__: Any) -> Any:
        raise full

    owner: Any = getattr(decoder, "_decoder", None)
    name = "logits"
    if owner is None:  # transformers' own forward: its last block, when the others have their keys
        blocks = [
            m for m in answering.model.language.base_model.modules() if isinstance(m, torch.nn.ModuleList)
        ]
        owner, name = max(blocks, key=len)[-1], "forward"
    for call in (lambda: running.join([asked(kind, 2, options)]), running.step):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(torch.OutOfMemoryError):
                call()
        assert running.rows == 2
    for token in answered(running, [asked(kind, 2, options)])[2]:
        told.setdefault(2, []).append(token)
    assert told[2][-1].said == alone(kind, 2, MOST)


# ------------------------------------------------------------------------------------------------------------------- memory


@EVERY
def test_memory_follows_who_is_there(kind: str) -> None:
    answering, dialogues, _ = world(kind)
    running, options, seen = answering.running(4, picture_memory_mib=0), AnswerOptions(MOST), []
    for turn in range(40):
        joining = [asked(kind, (turn + k) % len(dialogues), options, (turn, k)) for k in range(running.room)]
        keys = [token.key for token in running.join(joining) if token.finished is None]
        running.step()
        seen.append(running.bytes)
        running.leave(keys[turn % 2 :: 2])
    assert max(seen[:10]) > 0
    assert max(seen[20:]) <= 2 * max(seen[:10])
    answered(running, [])
    assert (running.rows, running.bytes) == (0, 0)


def test_room_grows_in_steps_and_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "COLUMN_STEP", 4)
    cache = slots.Slots(2, 3, 5, torch.float32, torch.device("cpu"))
    cache.add([2, 30])
    wide = cache.bytes
    draw = torch.randn(2, 3, 2, 5)
    cache.write(1, draw, -draw)
    cache.keep([0])
    assert cache.bytes * 4 <= wide
    keys, values = cache.held(1, 0, 2)
    assert torch.equal(keys, draw[:1])
    assert torch.equal(values, -draw[:1])


def test_those_behind_fill_the_holes() -> None:
    assert slots.closed_up([True, False, True, False, True]) == [0, 4, 2]
    assert slots.closed_up([False, False]) == []
    assert slots.closed_up([True] * 3) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["vqa", "llama"])
def test_a_picture_passes_the_tower_once(kind: str) -> None:
    answering, dialogues, _ = world(kind)
    passed: list[int] = []
    hook = answering.model.vision.register_forward_hook(
        lambda _, args, kwargs, out: passed.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    options, count = AnswerOptions(1), len({key for dialogue in dialogues for key in dialogue.pictures})
    everything = [asked(kind, number, options) for number in range(len(dialogues))]
    remembering, forgetting = answering.running(16), answering.running(16, picture_memory_mib=0)
    for running, expected in (
        (remembering, count),
        (remembering, 0),
        (forgetting, count),
        (forgetting, count),
    ):
        passed.clear()
        running.join(everything)
        assert sum(passed) == expected
    hook.remove()
    one = remembering._pictures.bytes // count
    small = answering.running(16, picture_memory_mib=one / 2**20)
    small.join(everything)
    assert small._pictures.bytes == one


def test_a_models_running_is_that_of_the_protocol() -> None:
    made: list[Answering] = [world("vqa")[0], world("llama")[0]]
    assert all(isinstance(answering.running(2), Running) for answering in made)


def test_questions_that_an_endpoint_remembered_can_be_learned_from() -> None:
    answering = tiny_vqa.tiny_vqa(2)
    answering.model.text.requires_grad_(False)
    answering.hold_locked_parts()
    dialogues, pictures = tiny_vqa.dialogues(4), tiny_vqa.pictures()
    expected = [answering.answer([dialogue], pictures)[0] for dialogue in dialogues]
    answering._question_states.clear()
    running = answering.running(4)
    told = answered(running, [Asked(n, d, pictures, AnswerOptions(5)) for n, d in enumerate(dialogues)])
    assert [tokens[-1].said for tokens in told.values()] == expected
    answering.model(**answering.collate(dialogues, pictures).inputs).loss.backward()
