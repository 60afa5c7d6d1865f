"""Rows of a comparison, and RESULTS.md, to which every run appends its table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fmray.runtime.machine import machine, versions

TITLE = "# Results\n\nEach run of `fmray benchmark` appends its table: medians (lowest–highest, number of repeats).\n"


@dataclass(frozen=True, slots=True)
class Row:
    """`Row("training step", "0.71 s", "0.80 s", 1.13, bar=1.0, better="higher")`"""

    what: str
    ours: str
    other: str
    """Theirs, or before."""
    ratio: float | None = None
    bar: float | None = None
    better: Literal["higher", "lower"] = "higher"

    @property
    def met(self) -> bool | None:
        """Whether the ratio keeps its bar; None where there is none."""
        if self.ratio is None or self.bar is None:
            return None
        return self.ratio >= self.bar if self.better == "higher" else self.ratio <= self.bar

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands in the table."""
        sign = "≥" if self.better == "higher" else "≤"
        bar = "" if self.bar is None else f"{sign} {self.bar:g}"
        met = {True: "yes", False: "**no**", None: ""}[self.met]
        return (self.what, self.ours, self.other, "" if self.ratio is None else f"{self.ratio:.3g}", bar, met)


def markdown(rows: Sequence[Row], command: str, peer: dict[str, str], notes: Sequence[str]) -> str:
    """A section with the command, the machine, the versions and the rows."""
    here, ours = machine(), versions()
    lines = [
        f"\n## {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} · `{command}`\n",
        f"{here['cpu']}, {here['cores']} cores, {here['system']}  ",
        f"fmray side: {', '.join(f'{name} {version}' for name, version in ours.items())}  ",
        f"peer side: {', '.join(f'{name} {version}' for name, version in peer.items()) or 'none'}\n",
        "| what | ours | theirs / before | ratio | bar | met |",
        "|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row.cells) + " |" for row in rows]
    lines += [""] + [f"- {note}" for note in notes]
    return "\n".join(lines) + "\n"


def append(text: str, path: Path) -> None:
    """Add a section to RESULTS.md, which is made with its title the first time."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TITLE, encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
