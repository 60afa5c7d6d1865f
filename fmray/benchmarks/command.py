"""What every `fmray benchmark NAME` has: `--quick`, `--parts`, `--results`, parts that run in turn, a table at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from fmray.benchmarks.table import Row, append, markdown
from fmray.errors import ConfigError
from fmray.runtime.machine import load_average

PARITY = Path(".parity")
"""Where peers' environments are kept, under the current folder."""


class Benched(Protocol):
    """What the parts of a run share."""

    notes: list[str]
    peer: dict[str, str]
    """Versions of the peer's packages."""


B = TypeVar("B", bound=Benched)
Parts = Mapping[str, Callable[[B], list[Row]]]


@dataclass(frozen=True, slots=True)
class Options:
    """`Options("fmray benchmark clip --quick", quick=True, parts=("losses",), results=Path("RESULTS.md"))`"""

    command: str
    quick: bool
    parts: tuple[str, ...]
    results: Path


def read_options(name: str, about: str | None, parts: Sequence[str], arguments: Sequence[str]) -> Options:
    """Raises ConfigError for an unknown option or part."""
    cure = f"parts are {', '.join(parts)}; --help lists the options"

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"benchmark {name}", message, cure)

    parser = Parser(prog=f"fmray benchmark {name}", description=about)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it all runs, not how fast")
    results = "file to append the table to"
    parser.add_argument("--results", type=Path, default=Path("RESULTS.md"), help=results)
    only = f"only these of {', '.join(parts)}, with spaces or commas between"
    parser.add_argument("--parts", nargs="+", default=[], help=only)
    given = parser.parse_args(arguments)
    chosen = [part for word in given.parts for part in word.split(",") if part]
    for part in chosen:
        if part not in parts:
            raise ConfigError(f"benchmark {name}", f"--parts {part}", cure)
    command = f"fmray benchmark {name}" + (" --quick" if given.quick else "")
    if chosen and chosen != list(parts):
        command += f" --parts {' '.join(chosen)}"
    return Options(command, given.quick, tuple(chosen or parts), given.results)


def run_parts(parts: Parts[B], options: Options, bench: B) -> list[Row]:
    """The chosen parts in turn; their table goes to the results' file, also where a later part ended in an error."""
    rows: list[Row] = []
    try:
        for name in options.parts:
            sys.stderr.write(f"· {name} …\n")
            rows += parts[name](bench)
            bench.notes.append(f"{name}: load average {load_average()} at its end.")
    finally:
        if rows:
            append(markdown(rows, options.command, bench.peer, bench.notes), options.results)
    return rows
