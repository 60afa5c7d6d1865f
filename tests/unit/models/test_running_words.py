"""What running answers are made of: the choice of a token, its spelling, text in pieces, pictures that answer; bare logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from fmray.errors import ConfigError
from fmray.models.answer_tokenizer import learn_tokenizer
from fmray.models.decoding.choice import NUCLEUS, AnswerOptions, choose, nucleus
from fmray.models.decoding.generate import make_decoder
from fmray.models.decoding.rows import prompt_rows
from fmray.models.decoding.running import Asked, Spelled
from fmray.models.decoding.slots import closed_up
from fmray.models.decoding.spelling import Pieces, Spelling
from fmray.types import Dialogue, Pictures
from tests.drawing import drawing
from tests.tiny_mllm import about, pictures, tiny_mllm
from tests.unit.models.decoding.policies import policy

FEW = settings(max_examples=40, deadline=None, derandomize=True)


# ---------------------------------------------------------------------------------------------------------------- the choice


def test_a_nucleus_is_the_fewest_likeliest_tokens_with_the_share() -> None:
    logits_RV = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log().repeat(6, 1)
    share_R = torch.tensor([0.2, 0.5, 0.6, 0.85, 0.95, 1.0], dtype=torch.float64)
    stays = torch.isfinite(nucleus(logits_RV, share_R)).tolist()
    both, all_of_them = [False, True, False, True], [True] * 4
    # the two of 0.1 are equals: they stay together
    assert stays == [[False, True, False, False]] * 2 + [both, all_of_them, all_of_them, all_of_them]


@FEW
@drawn(
    st.integers(0, 10_000), st.floats(0.01, 1.0), st.floats(0.01, 5.0), st.sampled_from((5, NUCLEUS, 1500))
)
def test_a_nucleus_beside_the_definition(seed: int, share: float, spread: float, vocabulary: int) -> None:
    logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    order = logits_V.argsort(descending=True)
    p = torch.softmax(logits_V, 0)[order].double()
    count = min(int((p.cumsum(0) - p < share).sum()), vocabulary)
    expected = {int(token) for token in order[:count]}
    given = torch.stack(
        [logits_V, torch.zeros(vocabulary)]
    )  # a flat neighbour needs the whole vocabulary sorted
    found = nucleus(given, torch.tensor([share, 0.99], dtype=torch.float64))[0]
    assert set(torch.isfinite(found).nonzero().squeeze(1).tolist()) == expected


def test_drawn_tokens_come_as_often_as_they_should() -> None:
    p = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    for temperature, share in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.6)):
        tempered = torch.softmax(p.log() / temperature, 0)
        wanted = torch.isfinite(nucleus(tempered.log()[None], torch.tensor([share]).double())[0]) * tempered
        options = [AnswerOptions(9, temperature, share, seed) for seed in range(4000)]
        choices = choose(p.log().repeat(4000, 1), options, [3] * 4000)
        counted = torch.tensor([choice.token for choice in choices]).bincount(minlength=5) / 4000
        assert torch.allclose(counted, wanted / wanted.sum(), atol=0.03)
        assert all(
            choice.logprob == pytest.approx(float(p[choice.token].log()), abs=1e-5) for choice in choices
        )


def test_positions_and_seeds_draw_on_their_own() -> None:
    options = AnswerOptions(9, temperature=1.0, seed=3)
    flat = torch.zeros(64, 50)
    at_each = [choice.token for choice in choose(flat, [options] * 64, list(range(64)))]
    again = [choose(flat[:1], [options], [place])[0].token for place in range(64)]
    assert at_each == again
    assert len(set(at_each)) > 25


def test_wishes_side_by_side() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0], [float("nan"), 0, 0], [0, float("inf"), 0]])
    options = [
        AnswerOptions(4, top_logprobs=2),
        AnswerOptions(4, temperature=1e-30),
        AnswerOptions(4, temperature=1.0, top_p=0.5),
        AnswerOptions(4, top_logprobs=20),
    ]
    first, cold, *broken = choose(logits, options, [0] * 4)
    logp = logits[0].log_softmax(0)
    assert [token for token, _ in first.alternatives] == [1, 2]
    assert [logprob for _, logprob in first.alternatives] == pytest.approx(logp[[1, 2]].tolist())
    assert (first.token, cold.token, cold.alternatives) == (1, 1, ())
    assert [choice.finite for choice in (first, cold, *broken)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1: must be 0 (greedy) or above"),
        ({"temperature": float("nan")}, "temperature=nan: must be 0 (greedy) or above"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5: must be above 0 and at most 1"),
        ({"top_logprobs": 21}, "top_logprobs=21: must be 0 to 20"),
    ],
)
def test_wishes_out_of_range(wish: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AnswerOptions(**{"max_new_tokens": 4, **wish})
    assert str(caught.value) == says


# --------------------------------------------------------------------------------------------------------------------- text


@FEW
@drawn(st.lists(st.integers(0, 299), max_size=40), st.text(max_size=30))
def test_pieces_are_whole_letters_and_add_up_to_the_text(numbers: list[int], text: str) -> None:
    """Any tokens, also such that spell no text; and those of a text of any script."""
    tokenizer = learn_tokenizer(["red square", "a blue circle", "größer 🙂 日本"], 300)
    spelling = Spelling(tokenizer)
    for ids in (numbers, tokenizer(text)["input_ids"]):
        known = [token for token in ids if token < len(tokenizer) and token != tokenizer.eos_token_id]
        pieces = Pieces(lambda some: tokenizer.decode(list(some), skip_special_tokens=True))
        told = [*(pieces.add(token) for token in known), pieces.end()]
        whole = tokenizer.decode(known, skip_special_tokens=True)
        assert "".join(told) == whole.strip()
        octets = b"".join(map(spelling.octets, known))
        assert octets.decode("utf-8", errors="replace") == whole
    assert b"".join(map(spelling.octets, tokenizer(text)["input_ids"])) == text.encode()


def test_half_a_letter_waits_and_comes_at_the_end_as_what_it_is() -> None:
    tokenizer = learn_tokenizer(["no"], 257)
    ids = tokenizer("a🙂 ")["input_ids"]
    pieces = Pieces(lambda some: tokenizer.decode(list(some), skip_special_tokens=True))
    assert [pieces.add(token) for token in ids] == ["a", "", "", "", "🙂", ""]
    assert pieces.end() == ""
    pieces = Pieces(lambda some: tokenizer.decode(list(some), skip_special_tokens=True))
    assert [pieces.add(token) for token in ids[:3]] == ["a", "", ""]
    assert pieces.end() == "�"
    assert Spelled(Spelling(tokenizer).octets(ids[1]), 0.0).text == "�"


def test_other_tokenizers_spell_too() -> None:
    class Held:
        backend_tokenizer = Tokenizer(models.BPE({"\u2581red": 0, "<0xE2>": 1, "x": 2, "<s>": 3}, []))

    Held.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    Held.backend_tokenizer.add_special_tokens(["<s>"])
    spelling = Spelling(Held)
    assert [spelling.octets(token) for token in range(5)] == [b" red", b"\xe2", b"x", b"<s>", b""]


# ------------------------------------------------------------------------------------------------------- bare rows and pictures


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "llama scaled rope", "gpt2", "qwen2", "neox"])
def test_logits_of_rows_that_come_and_go(name: str) -> None:
    """Beside a whole forward of each row's own tokens, while rows join, are moved into holes and leave."""
    model, draw = policy(name).eval(), torch.Generator().manual_seed(0)
    rows, said = prompt_rows(make_decoder(model)), list[list[int]]()

    def check(logits: torch.Tensor, those: list[list[int]]) -> None:
        for row, logits_V in zip(those, logits, strict=True):
            assert torch.allclose(logits_V, model(torch.tensor([row])).logits[0, -1], atol=1e-5)

    for turn in range(12):
        if turn % 3 == 0:
            lengths = torch.randint(1, 12, (3,), generator=draw)
            ids = torch.randint(2, 97, (3, int(lengths.max())), generator=draw)
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            mask = mask if turn % 2 else mask.flip(1)
            new = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
            check(rows.join(ids, mask.long()), new)
            said += new
        token = torch.randint(2, 97, (len(said),), generator=draw)
        said = [[*row, int(one)] for row, one in zip(said, token, strict=True)]
        check(rows.step(token), said)
        assert rows.count == len(said)
        if turn % 2:
            stay = (torch.rand(len(said), generator=draw) < 0.7).tolist()
            order = closed_up(stay)
            rows.keep(order)
            said = [said[row] for row in order]
    rows.keep([])
    assert (rows.count, rows.bytes) == (0, 0)


def test_an_encoder_decoder_has_no_such_rows() -> None:
    with pytest.raises(ConfigError, match=r"^decoder='T5Decoder': answers join one another in decoder-only "):
        prompt_rows(make_decoder(policy("t5")))


@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
def test_an_answer_that_is_a_picture_ends_with_the_decision(tmp_path: Path, fusion: str) -> None:
    answering: Any = drawing(tmp_path, fusion=fusion)
    draw, decision = torch.Generator().manual_seed(5), answering.model.output.decision
    decision.weight.data.normal_(std=2.0, generator=draw)
    given = pictures(2)
    dialogues = [*(about(number % 2, number) for number in range(8)), about(None, 2)]
    options = AnswerOptions(12)
    seen = set()
    for bias in (-60.0, -20.0, 0.5, 20.0):
        decision.bias.data.fill_(bias)
        alone = [answering.answer([dialogue], given, max_new_tokens=12)[0] for dialogue in dialogues]
        running, told = answering.running(4), {}
        waiting = [Asked(number, dialogue, given, options) for number, dialogue in enumerate(dialogues)]
        while waiting or running.rows:
            joining, waiting = waiting[: running.room], waiting[running.room :]
            for token in [*running.join(joining), *running.step()]:
                if token.finished:
                    told[token.key] = token
        for number, expected in enumerate(alone):
            said = told[number].said
            assert said == expected
            assert (said.embedding_D is None) == (expected.embedding_D is None)
            if said.embedding_D is not None:
                assert told[number].id == answering.renderer.routing_ids[0]
                assert told[number].finished == "stop"
                assert torch.allclose(said.embedding_D, expected.embedding_D, atol=1e-5)
            seen.add((said.embedding_D is not None, bool(said.text)))
    assert (True, False) in seen
    assert (False, True) in seen


def test_dialogues_without_pictures_and_with_turns_left_out() -> None:
    """What runs is what answers: no picture at all, and a dialogue whose oldest turns were left out."""
    answering = tiny_mllm(seed=3, max_tokens=60)
    long: list[Dialogue] = [about(None, 2), about(None, 0, turns=4), about(0, 1, turns=3)]
    given, options = pictures(1), AnswerOptions(6)
    running = answering.running(3)
    texts: dict[Any, str] = dict.fromkeys(range(3), "")
    tokens = running.join(
        [Asked(n, d, given if d.pictures else Pictures(()), options) for n, d in enumerate(long)]
    )
    while True:
        for token in tokens:
            texts[token.key] += token.text
            if token.said is not None:
                assert isinstance(token.key, int)
                assert token.said == answering.answer([long[token.key]], given, max_new_tokens=6)[0]
        if not running.rows:
            break
        tokens = running.step()
