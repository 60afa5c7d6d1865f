"""Small verdicts of three kinds and tiny scorers over them, so that whole trainings of reward models need no download."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from tests.keys import with_keys
from tests.stories import OBJECTS, SUBJECTS, make_tokenizer

GRADES = ("loves", "likes", "bears", "hates")
"""From best to worst."""
TINY = {
    "vocab_size": 128,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def opinions(kind: str) -> list[dict[str, Any]]:
    """Every subject about every object: 168 labelled texts, or 42 pairs or rankings of two to four answers."""
    rows: list[dict[str, Any]] = []
    if kind == "labelled":
        for number, (grade, subject, thing) in enumerate(product(GRADES, SUBJECTS, OBJECTS)):
            label = "good" if grade in GRADES[:2] else "bad"
            rows.append(
                {"text": f"{subject} {grade} {thing}{' and its taste' * (number % 3)}", "label": label}
            )
        return rows
    for number, (subject, thing) in enumerate(product(SUBJECTS, OBJECTS)):
        answers = [f"{grade} {thing}" for grade in GRADES]
        if kind == "pairs":
            rows.append({"prompt": subject, "chosen": answers[0], "rejected": answers[1 + number % 3]})
        else:
            rows.append({"prompt": subject, "answers": answers[: 4 - number % 3]})
    return rows


def write_opinions(folder: Path, kind: str) -> Path:
    """train.jsonl and two held-out files; the second is of short texts."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = opinions(kind)
    parts = {"train": rows[::2] + rows[1::4], "test": rows[3::4], "test_few": rows[3::12]}
    for name, part in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def opinion_run(folder: Path, kind: str = "labelled", **changes: Any) -> dict[str, Any]:
    """A whole training over the opinions, as nested keys; `changes` are dotted keys with `__`."""
    if not (folder / kind).exists():
        write_opinions(folder / kind, kind)
        make_tokenizer(ends=True).save_pretrained(folder / "tokenizer")
    config: dict[str, Any] = {
        "run": {"name": "opinions", "storage": str(folder / "runs")},
        "runtime": {"threads": 1},
        "report": {"progress": False},
        "data": {
            "kind": kind,
            "source": {"kind": "jsonl", "path": str(folder / kind)},
            "batch_size": 6,
            "bucket_batches": 4,
        },
        "model": {
            "source": "arch:bert",
            "tokenizer": str(folder / "tokenizer"),
            "pretrained": False,
            "overrides": TINY,
            "max_tokens": 32,
        },
        "optimizer": {"lr": 3e-3},
        "train": {"steps": 40},
        "evaluate": {"batch_size": 8},
    }
    return with_keys(config, changes, "__")


def write_opinion_config(folder: Path, name: str, kind: str = "labelled", **changes: Any) -> Path:
    """The configuration as a file for `--config`."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(opinion_run(folder, kind, run__name=name, **changes)), encoding="utf-8")
    return path
