"""Keys and values of rows that come and go: each row begins at column 0, whatever the others hold.

R rows  H key/value heads  C columns  W width of a head  K rows that join or stay
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmray.models.decoding.attention import hiding

ROW_STEP, COLUMN_STEP = 8, 64
"""Room grows in such steps: a copy of all that is held once in 64 tokens is nothing beside 64 readings of it."""


class Slots:
    """One cache. Rows lie without gaps, so that attention reads a slice: who leaves is replaced by the last.

    What stands behind a row's own tokens is finite always (zeros, or an earlier value): hidden columns are multiplied too.
    """

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.lengths: list[int] = []
        """Tokens that each row holds."""
        self._shape, self._dtype, self._device = (heads, width), dtype, device
        self._keys = [self._new(0, 0) for _ in range(layers)]
        self._values = [self._new(0, 0) for _ in range(layers)]

    @property
    def bytes(self) -> int:
        """Memory that is held."""
        return sum(held.numel() * held.element_size() for held in (*self._keys, *self._values))

    def add(self, lengths: Sequence[int]) -> None:
        """New rows behind the others, of so many tokens each, which `write` brings."""
        first = len(self.lengths)
        self._fit(first + len(lengths), max([*self.lengths, *lengths]))
        for held in (*self._keys, *self._values):
            held[first : first + len(lengths)] = 0  # another row stood there, perhaps a broken one
        self.lengths += lengths

    def write(self, layer: int, k_KHPW: Tensor, v_KHPW: Tensor) -> None:
        """The first P columns of the last K rows."""
        rows = slice(len(self.lengths) - len(k_KHPW), len(self.lengths))
        self._keys[layer][rows, :, : k_KHPW.shape[2]] = k_KHPW
        self._values[layer][rows, :, : v_KHPW.shape[2]] = v_KHPW

    def make_room(self) -> None:
        """For one more token in every row."""
        self._fit(len(self.lengths), max(self.lengths) + 1)

    def append(self, layer: int, at_R: Tensor, k_RHW: Tensor, v_RHW: Tensor) -> None:
        """One token to every row; at_R: their lengths. They count once `grown` is told, when all layers have them."""
        rows_R = torch.arange(len(at_R), device=self._device)
        self._keys[layer][rows_R, :, at_R] = k_RHW
        self._values[layer][rows_R, :, at_R] = v_RHW

    def grown(self) -> None:
        """Every row has one token more."""
        self.lengths = [length + 1 for length in self.lengths]

    def held(self, layer: int, first: int, columns: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows from `first` on, [R, H, columns, W], views."""
        rows = slice(first, len(self.lengths))
        return self._keys[layer][rows, :, :columns], self._values[layer][rows, :, :columns]

    def bias(self, lengths: Sequence[int]) -> Tensor:
        """What to add to scores so that each row sees so many columns, [R · H, 1, max(lengths)]."""
        columns = torch.arange(max(lengths), device=self._device)
        seen_RC = columns < torch.tensor(lengths, device=self._device)[:, None]
        return hiding(seen_RC, self._dtype)[:, 0].repeat_interleave(self._shape[0], dim=0)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these, in this order: each stands where it stood, or comes from behind the last place (`closed_up`)."""
        moves = [(row, place) for place, row in enumerate(rows) if row != place]
        if moves:
            assert min(row for row, _ in moves) >= len(rows), "a row that is moved must come from behind"
            from_K, to_K = (torch.tensor(side, device=self._device) for side in zip(*moves, strict=True))
            columns = max(self.lengths)  # whoever stood there leaves nothing behind
            for held in (*self._keys, *self._values):
                held[to_K, :, :columns] = held[from_K, :, :columns]
        self.lengths = [self.lengths[row] for row in rows]
        self._fit(len(rows), max(self.lengths, default=0))

    def _fit(self, rows: int, columns: int) -> None:
        """Room for so many, and not more than four times that."""
        wanted = -(-rows // ROW_STEP) * ROW_STEP, -(-columns // COLUMN_STEP) * COLUMN_STEP
        for part in (self._keys, self._values):
            for layer, old in enumerate(part):
                have = old.shape[0], old.shape[2]
                fits = wanted[0] <= have[0] and wanted[1] <= have[1]
                if fits and have[0] * have[1] <= 4 * wanted[0] * wanted[1]:
                    continue
                new, kept = self._new(*wanted), (min(wanted[0], have[0]), min(wanted[1], have[1]))
                new[: kept[0], :, : kept[1]] = old[: kept[0], :, : kept[1]]
                part[layer] = new

    def _new(self, rows: int, columns: int) -> Tensor:
        heads, width = self._shape
        return torch.zeros((rows, heads, columns, width), dtype=self._dtype, device=self._device)


def closed_up(stay: Sequence[bool]) -> list[int]:
    """The rows that stay, in the order that moves fewest: those behind the last place fill the holes before it.

    `closed_up([True, False, True, False, True])` is `[0, 4, 2]`.
    """
    count = sum(stay)
    behind = iter([row for row in range(count, len(stay)) if stay[row]])
    return [row if stay[row] else next(behind) for row in range(count)]
