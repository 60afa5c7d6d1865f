"""Rows of several dialogues, none of which sees another; what those about the same picture begin with stands there once.

R rows  L columns  K pictures of a row. A group is a tree: its beginning is branch 0, each dialogue goes on as a branch of its
own, which sees the beginning and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE = -100
"""A label that is none."""
BEGINNING = 8
"""Tokens that dialogues without pictures must have in common to be put together: one that begins otherwise spoils it for none."""


@dataclass(frozen=True, slots=True)
class Line:
    """One dialogue's tokens. `Line(ids=(7, 12, 31, 2), learns=(False, False, True, True), starts=(0,), pictures=(4,))`"""

    ids: tuple[int, ...]
    learns: tuple[bool, ...]
    """Which of them the model should learn to say."""
    starts: tuple[int, ...] = ()
    """The token at which each picture stands: that one and those behind it see it."""
    pictures: tuple[int, ...] = ()
    """Which picture it is, a row of the batch's pictures."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows, padded on the right with id 0."""

    ids_RL: Tensor
    """int64 [R, L]."""
    labels_RL: Tensor
    """int64 [R, L], the token's own id where it is to be learned, else -100; not shifted."""
    positions_RL: Tensor
    """int64 [R, L], the token's place in its own dialogue."""
    group_RL: Tensor
    """int64 [R, L], the tree within its row, from 0; -1 at padding."""
    branch_RL: Tensor
    """int64 [R, L], 0: the shared beginning, from 1: the dialogues."""
    before_RL: Tensor
    """int64 [R, L], the column of the token before it in its own dialogue, from where it is predicted; -1: none."""
    owner_RL: Tensor
    """int64 [R, L], the dialogue that a branch belongs to, as numbered in the call; -1 elsewhere."""
    seen_RL: Tensor
    """int64 [R, L], pictures of its group that stand at or before the token."""
    pictures: tuple[int, ...]
    """The picture of each block of placeholders, in reading order: along a row, then the next row."""
    memory_RK: Tensor
    """int64 [R, K], pictures of the row's groups, each group's in its order; -1: none."""
    memory_group_RK: Tensor
    """int64 [R, K], the group that each belongs to; -2: none."""
    memory_place_RK: Tensor
    """int64 [R, K], its place among the group's pictures, from 0."""


@dataclass(slots=True)
class _Tree:
    """Dialogues that begin alike."""

    prefix: int
    members: list[int] = field(default_factory=list)
    tokens: int = 0


def visible(group_RL: Tensor, branch_RL: Tensor) -> Tensor:
    """What each token may see, bool [R, 1, L, L] (query, key); padding sees itself alone, so that no row is empty."""
    L = group_RL.shape[1]
    of_i, of_j = group_RL[:, :, None], group_RL[:, None, :]
    own_branch = (branch_RL[:, None, :] == 0) | (branch_RL[:, None, :] == branch_RL[:, :, None])
    place = torch.arange(L, device=group_RL.device)
    before = place[None, :] <= place[:, None]
    seen_RLL = (of_i == of_j) & (of_i >= 0) & own_branch & before
    return (seen_RLL | torch.eye(L, dtype=torch.bool, device=group_RL.device)).unsqueeze(1)


def pack(lines: Sequence[Line], row_tokens: int | None = None) -> Packed:
    """Trees of the dialogues that share pictures and all words up to them, first fit into rows of row_tokens.

    Dialogues without pictures share what they begin with (a template's system message), where there are rows to fill.
    None: a row for each tree. A tree longer than a row becomes several, each with the beginning. No line may be longer than a
    row.
    """
    trees = [
        tree
        for cluster in _clusters(lines, row_tokens is not None)
        for tree in _trees(lines, cluster, row_tokens)
    ]
    rows: list[list[_Tree]] = []
    free: list[int] = []
    for tree in trees:
        fits = (row for row, room in enumerate(free) if tree.tokens <= room)
        row = next(fits, None) if row_tokens is not None else None
        if row is None:
            rows.append([])
            free.append(row_tokens or tree.tokens)
            row = len(rows) - 1
        rows[row].append(tree)
        free[row] -= tree.tokens
    return _filled(lines, rows)


def _clusters(lines: Sequence[Line], several: bool) -> list[list[int]]:
    """Dialogues with the same pictures at the same places behind the same words.

    One without pictures is alone, or `several` that begin with the same few tokens are together.
    """
    found: dict[object, list[int]] = {}
    for number, line in enumerate(lines):
        key: object = number
        if line.pictures:
            key = (line.pictures, line.starts, line.ids[: line.starts[-1]])
        elif several:
            key = line.ids[:BEGINNING]
        found.setdefault(key, []).append(number)
    return list(found.values())


def _trees(lines: Sequence[Line], cluster: list[int], row_tokens: int | None) -> list[_Tree]:
    prefix = _shared(lines, cluster)
    trees = [_Tree(prefix, tokens=prefix)]
    for number in cluster:
        branch = len(lines[number].ids) - prefix
        if row_tokens is not None and trees[-1].members and trees[-1].tokens + branch > row_tokens:
            trees.append(_Tree(prefix, tokens=prefix))
        trees[-1].members.append(number)
        trees[-1].tokens += branch
    return trees


def _shared(lines: Sequence[Line], cluster: list[int]) -> int:
    """How many tokens all of them begin with, up to the first that is learned: that one counts for each of them."""
    first = lines[cluster[0]]
    shared = len(first.ids)
    for number in cluster:
        line = lines[number]
        shared = min(shared, line.learns.index(True) if True in line.learns else len(line.ids))
        pairs = zip(first.ids[:shared], line.ids[:shared], strict=False)
        shared = next((place for place, (a, b) in enumerate(pairs) if a != b), min(shared, len(line.ids)))
    return shared


class _Row:
    """The columns of one row while it is filled."""

    def __init__(self) -> None:
        self.columns: dict[str, list[int]] = {name: [] for name in _PADDING}
        self.pictures: list[int] = []
        self.memory: list[tuple[int, int, int]] = []

    def add(self, line: Line, start: int, end: int, group: int, branch: int, owner: int, before: int) -> None:
        """Tokens start to end of a line; `before` is the column of the one before them."""
        column, count = len(self.columns["ids"]), end - start
        self.columns["ids"] += line.ids[start:end]
        pairs = zip(line.ids[start:end], line.learns[start:end], strict=True)
        self.columns["labels"] += [token if learns else IGNORE for token, learns in pairs]
        self.columns["positions"] += range(start, end)
        for name, value in (("group", group), ("branch", branch), ("owner", owner)):
            self.columns[name] += [value] * count
        self.columns["before"] += [before, *range(column, column + count - 1)][:count]
        self.columns["seen"] += [sum(at <= place for at in line.starts) for place in range(start, end)]
        inside = zip(line.starts, line.pictures, strict=True)
        self.pictures += [picture for at, picture in inside if start <= at < end]


_PADDING = {
    "ids": 0,
    "labels": IGNORE,
    "positions": 0,
    "group": -1,
    "branch": 0,
    "before": -1,
    "owner": -1,
    "seen": 0,
}


def _filled(lines: Sequence[Line], trees_of_R: list[list[_Tree]]) -> Packed:
    rows = []
    for trees in trees_of_R:
        row = _Row()
        for group, tree in enumerate(trees):
            first = lines[tree.members[0]]
            column = len(row.columns["ids"])
            row.add(first, 0, tree.prefix, group, 0, -1, -1)
            last = column + tree.prefix - 1 if tree.prefix else -1
            for branch, number in enumerate(tree.members, 1):
                line = lines[number]
                row.add(line, tree.prefix, len(line.ids), group, branch, number, last)
            row.memory += [(picture, group, place) for place, picture in enumerate(first.pictures)]
        rows.append(row)
    length = max(len(row.columns["ids"]) for row in rows)
    made = {
        f"{name}_RL": torch.tensor(
            [row.columns[name] + [value] * (length - len(row.columns[name])) for row in rows]
        )
        for name, value in _PADDING.items()
    }
    K = max(len(row.memory) for row in rows)
    memory_RK3 = [row.memory + [(-1, -2, 0)] * (K - len(row.memory)) for row in rows]
    memory = torch.tensor(memory_RK3, dtype=torch.int64).view(len(rows), K, 3)
    return Packed(
        **made,
        pictures=tuple(picture for row in rows for picture in row.pictures),
        memory_RK=memory[..., 0],
        memory_group_RK=memory[..., 1],
        memory_place_RK=memory[..., 2],
    )
