"""Rows of trees: who sees whom, where a token is predicted from, what fits where; nothing lost, nothing counted twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.models.packing import Line, Packed, pack, visible

IMAGE = 9


def line(picture: int | None, question: list[int], answer: list[int], tokens: int = 2) -> Line:
    """Word 1, the picture's placeholders, the question, the answer, an unlearned end."""
    front = [1] if picture is None else [1, *[IMAGE] * tokens]
    ids = [*front, *question, *answer, 8]
    learns = [False] * (len(front) + len(question)) + [True] * len(answer) + [False]
    places = ((), ()) if picture is None else ((1,), (picture,))
    return Line(tuple(ids), tuple(learns), *places)


def test_a_tree_by_hand() -> None:
    packed = pack([line(4, [5, 6], [7]), line(4, [5, 3], [2, 2])])
    assert packed.ids_RL.tolist() == [[1, 9, 9, 5, 6, 7, 8, 3, 2, 2, 8]]
    assert packed.labels_RL.tolist() == [[-100, -100, -100, -100, -100, 7, -100, -100, 2, 2, -100]]
    assert packed.positions_RL.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]]
    assert packed.branch_RL.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert packed.before_RL.tolist() == [[-1, 0, 1, 2, 3, 4, 5, 3, 7, 8, 9]]
    assert packed.owner_RL.tolist() == [[-1, -1, -1, -1, 0, 0, 0, 1, 1, 1, 1]]
    assert packed.seen_RL.tolist() == [[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert packed.pictures == (4,)  # once, for both
    assert packed.memory_RK.tolist() == [[4]]


def test_a_first_answer_token_that_differs_is_predicted_from_the_shared_end() -> None:
    """Captions: the answer follows the picture at once, in every branch; what they share of it counts for each."""
    packed = pack([line(0, [], [5, 6]), line(0, [], [5, 7])])
    assert packed.ids_RL.tolist() == [[1, 9, 9, 5, 6, 8, 5, 7, 8]]
    assert packed.before_RL.tolist()[0][3] == packed.before_RL.tolist()[0][6] == 2
    assert (packed.labels_RL >= 0).sum() == 4


def test_visible_is_the_definition() -> None:
    packed = pack([line(0, [5], [6]), line(0, [4], [7]), line(1, [5], [6]), line(None, [3], [2])], 20)
    seen = visible(packed.group_RL, packed.branch_RL)[:, 0]
    for row in range(len(seen)):
        group, branch = packed.group_RL[row].tolist(), packed.branch_RL[row].tolist()
        for i in range(len(group)):
            for j in range(len(group)):
                same = group[i] == group[j] != -1 and branch[j] in (0, branch[i]) and j <= i
                assert seen[row, i, j].item() == (same or i == j)


def test_first_fit() -> None:
    lines = [line(None, [0] * count, [1]) for count in (4, 8, 3, 1)]  # 7, 11, 6 and 4 tokens
    packed = pack(lines, 13)
    assert [set(row) - {-1} for row in packed.owner_RL.tolist()] == [{0, 2}, {1}, {3}]
    assert packed.group_RL[0].tolist() == [0] * 7 + [1] * 6
    assert len(pack(lines).ids_RL) == 4  # without a length a row each


def test_a_tree_longer_than_a_row_repeats_its_beginning() -> None:
    packed = pack([line(0, [count], [5, 6]) for count in range(4)], 12)
    assert packed.ids_RL.tolist() == [[1, 9, 9, 0, 5, 6, 8, 1, 5, 6, 8], [1, 9, 9, 2, 5, 6, 8, 3, 5, 6, 8]]
    assert packed.pictures == (0, 0)


def test_dialogues_without_pictures_share_what_they_begin_with_where_there_are_rows_to_fill() -> None:
    front = [0, 3, 0, 4, 0, 2, 0]
    lines = [line(None, [*front, 5], [7]), line(None, [*front, 6], [7]), line(None, [2, *front], [7])]
    packed = pack(lines, 40)
    assert packed.ids_RL.tolist() == [[1, *front, 5, 7, 8, 6, 7, 8, 1, 2, *front, 7, 8]]
    assert packed.group_RL.tolist() == [[0] * 14 + [1] * 11]
    assert packed.branch_RL.tolist() == [[*[0] * 8, *[1] * 3, *[2] * 3, *[0] * 9, 1, 1]]
    assert packed.before_RL[0, 11] == 7  # behind the beginning, not behind the other dialogue
    assert packed.positions_RL[0, 11] == 8
    assert len(pack(lines).ids_RL) == 3


def test_pictures_behind_an_answer_stand_in_every_branch() -> None:
    """What comes behind a learned token is not shared: the second picture is in both branches, in reading order."""
    first = Line((1, 9, 5, 9, 6), (False, False, True, False, True), (1, 3), (0, 1))
    packed = pack([first, first])
    assert packed.ids_RL.tolist() == [[1, 9, 5, 9, 6, 5, 9, 6]]
    assert packed.pictures == (0, 1, 1)
    assert packed.seen_RL.tolist() == [[0, 1, 1, 2, 2, 1, 2, 2]]


def test_other_words_before_the_picture_make_another_tree() -> None:
    other = Line((2, 9, 9, 5, 6, 8), (False,) * 4 + (True, False), (1,), (0,))
    packed = pack([line(0, [5], [6]), other], 40)
    assert set(packed.group_RL[0].tolist()) == {0, 1}


def words_of(packed: Packed, owner: int) -> tuple[list[int], list[int], list[int]]:
    """A dialogue's ids, labels and positions, found by walking back from its last token."""
    row, column = (int(x) for x in (packed.owner_RL == owner).nonzero()[-1])
    found = []
    while column >= 0:
        found.append(column)
        column = int(packed.before_RL[row, column])
    columns = found[::-1]
    return tuple(t[row, columns].tolist() for t in (packed.ids_RL, packed.labels_RL, packed.positions_RL))  # type: ignore[return-value]


LINES = st.lists(
    st.builds(
        line,
        st.sampled_from([None, 0, 1]),
        st.lists(st.integers(2, 4), max_size=4),
        st.lists(st.integers(2, 4), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(LINES, st.sampled_from([None, 12, 20, 40]))
def test_every_dialogue_is_there_whole_and_once(lines: list[Line], row_tokens: int | None) -> None:
    packed = pack(lines, row_tokens)
    assert row_tokens is None or packed.ids_RL.shape[1] <= row_tokens
    for number, wanted in enumerate(lines):
        ids, labels, positions = words_of(packed, number)
        assert ids == list(wanted.ids)
        assert labels == [t if learns else -100 for t, learns in zip(ids, wanted.learns, strict=True)]
        assert positions == list(range(len(ids)))
    assert (packed.labels_RL >= 0).sum() == sum(sum(one.learns) for one in lines)
    blocks = (packed.ids_RL == IMAGE).sum().item()
    assert blocks == 2 * len(packed.pictures)


@pytest.mark.parametrize("padding", [0, 3])
def test_padding_sees_itself_alone(padding: int) -> None:
    group = torch.tensor([[0, 0, *[-1] * padding]])
    seen = visible(group, torch.zeros_like(group))[0, 0]
    assert seen[2:].int().equal(torch.eye(2 + padding, dtype=torch.int)[2:])
    assert not seen[:2, 2:].any()
