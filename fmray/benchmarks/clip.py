"""`fmray benchmark clip`: CLIP training beside open_clip's, GradCache's cost, Ray's overhead, and the losses; one run, one table.

Every figure is the median of repeats that alternate between the two sides (A B A B …) while the other waits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fmray.benchmarks.command import PARITY, read_options, run_parts
from fmray.benchmarks.losses import compare_losses
from fmray.benchmarks.overhead import compare_launchers
from fmray.benchmarks.peers import OPEN_CLIP, Measured, Side, open_clip_side, our_side
from fmray.benchmarks.table import Row
from fmray.benchmarks.workbench import FULL, QUICK, Sizes, peer_preparation, write_workbench

SAME_LOSS = 1e-5
"""First losses of both sides agree to this."""


@dataclass(slots=True)
class Bench:
    """What the parts of one run share."""

    python: Path
    """The peer environment's interpreter."""
    folder: Path
    sizes: Sizes
    notes: list[str] = field(default_factory=list)
    peer: dict[str, str] = field(default_factory=dict)

    def make(self) -> None:
        """Write the workbench; the tokenizer's words come from the peer."""
        with open_clip_side(self.python, 1) as theirs:
            self.peer = theirs.ask("words", folder=str(self.folder))
        write_workbench(self.folder, self.sizes)

    def sides(self) -> tuple[Side, Side]:
        """Both processes, not started."""
        return our_side(self.sizes.threads), open_clip_side(self.python, self.sizes.threads)

    def prepare(self, ours: Side) -> float:
        """Our side with the workbench's checkpoint; the first loss."""
        return float(ours.ask("prepare", folder=str(self.folder), sizes=asdict(self.sizes)))


def losses(bench: Bench) -> list[Row]:
    """Values and gradients of our losses against open_clip's."""
    found = compare_losses(bench.python, bench.folder)
    return [
        Row(f"{name}: largest difference", f"{worst:.1e}", "ClipLoss, SigLipLoss", worst, 1e-6, "lower")
        for name, worst in found.items()
    ]


def training(bench: Bench) -> list[Row]:
    """The same tensors, towers, weights and optimizer through both training steps."""
    sizes = bench.sizes
    ours, theirs = bench.sides()
    mine, peers = [], []
    with ours, theirs:
        first = bench.prepare(ours), float(theirs.ask("prepare", **peer_preparation(bench.folder, sizes)))
        last = [(side.ask("steps", count=sizes.steps)["loss"]) for side in (ours, theirs)]  # warm-up
        for _ in range(sizes.repeats):
            mine.append(sizes.batch / ours.ask("steps", count=sizes.steps)["seconds"])
            peers.append(sizes.batch / theirs.ask("steps", count=sizes.steps)["seconds"])
    a, b = Measured(tuple(mine)), Measured(tuple(peers))
    return [
        Row(
            "first loss, same weights and batch",
            f"{first[0]:.7f}",
            f"{first[1]:.7f}",
            abs(first[0] - first[1]),
            SAME_LOSS,
            "lower",
        ),
        Row(f"loss after {sizes.steps} steps", f"{last[0]:.6f}", f"{last[1]:.6f}", abs(last[0] - last[1])),
        Row(
            f"training, identical tensors and towers (batch {sizes.batch}, fp32, {sizes.threads} threads)",
            a.shown("images/s"),
            b.shown("images/s"),
            a.median / b.median,
            1.0,
        ),
    ]


WAYS: dict[str, dict[str, bool]] = {
    "training from files": {"pad": False, "keep": True},
    "… captions padded to 77 as theirs": {"pad": True, "keep": True},
    "… pictures decoded in every epoch as theirs": {"pad": False, "keep": False},
    "… both": {"pad": True, "keep": False},
}
"""The gain from files itemised: each way switches something off on our side."""


def files(bench: Bench) -> list[Row]:
    """The same picture files through both data paths and training loops, whole epochs."""
    sizes = bench.sizes
    ours, theirs = bench.sides()
    table = str(bench.folder / "pictures" / "train.csv")
    found: dict[str, list[float]] = {name: [] for name in [*WAYS, "theirs"]}
    tokens = 0.0
    with ours, theirs:
        bench.prepare(ours)
        theirs.ask("prepare", **peer_preparation(bench.folder, sizes))
        for _ in range(sizes.file_repeats):
            for name, way in WAYS.items():
                answer = ours.ask("files", epochs=sizes.epochs, **way)
                found[name].append(answer["pictures"] / answer["seconds"])
                tokens = tokens if way["pad"] else answer["tokens"]
                if name == next(iter(WAYS)):
                    peer = theirs.ask("files", table=table, epochs=sizes.epochs, workers=sizes.peer_workers)
                    found["theirs"].append(peer["pictures"] / peer["seconds"])
    peers = Measured(tuple(found.pop("theirs")))
    bench.notes.append(
        f"From files: {sizes.pictures} JPEG of {sizes.picture_side}×{sizes.picture_side}, {sizes.epochs} epochs, random crops on "
        f"both sides; open_clip_train's CSV data set with {sizes.peer_workers} workers, fmray's loader in the learner's process; "
        f"a batch's longest caption has {tokens:.0f} tokens on average."
    )
    rows = []
    for index, (name, values) in enumerate(found.items()):
        mine = Measured(tuple(values))
        bar = 1.2 if index == 0 else None
        rows.append(
            Row(name, mine.shown("images/s"), peers.shown("images/s"), mine.median / peers.median, bar)
        )
    return rows


def grad_cache(bench: Bench) -> list[Row]:
    """What GradCache costs over micro-batches of the same chunks, and what it saves over the whole batch."""
    sizes, rows = bench.sizes, []
    total = sizes.cached_rows
    with our_side(sizes.threads) as ours:
        bench.prepare(ours)
        for chunk in sizes.chunks:
            times: dict[bool, list[float]] = {True: [], False: []}
            for cached in times:
                ours.ask("chunked", rows=total, chunk=chunk, cached=cached)  # warm-up
            for _ in range(sizes.chunk_repeats):
                for cached, seconds in times.items():
                    seconds.append(ours.ask("chunked", rows=total, chunk=chunk, cached=cached))
            a, b = (Measured(tuple(times[cached])) for cached in (True, False))
            what = f"GradCache step / plain step, {total} rows in chunks of {chunk}"
            rows.append(Row(what, a.shown("s"), b.shown("s"), a.median / b.median, 1.40, "lower"))
    chunk = min(sizes.chunks)
    peaks = {}
    for part in (chunk, None):
        with our_side(sizes.threads) as ours:
            bench.prepare(ours)
            peaks[part] = ours.ask("memory", rows=sizes.memory_rows, chunk=part)
    what = f"peak memory of a step's forward and backward, {sizes.memory_rows} rows: GradCache in chunks of {chunk} / whole batch"
    ratio = peaks[chunk] / max(peaks[None], 1e-9)
    rows.append(Row(what, f"{peaks[chunk]:.0f} MiB", f"{peaks[None]:.0f} MiB", ratio))
    bench.notes.append(
        "GradCache: the plain step is forward and backward of the same rows in the same chunks with a loss inside each chunk."
    )
    return rows


def ray(bench: Bench) -> list[Row]:
    """Steady-state steps of Ray Train with one worker against local mode, and two workers beside them."""
    sizes = bench.sizes
    times = compare_launchers(bench.folder, sizes)
    local, one, two = (Measured(tuple(times[name])) for name in ("local", "ray 1", "ray 2"))
    images = f"{sizes.ray_batch / local.median:.1f} images/s"
    return [
        Row(
            f"Ray Train, 1 worker / local mode: step, batch {sizes.ray_batch}, {sizes.threads} threads",
            one.shown("s"),
            local.shown("s"),
            one.median / local.median,
            1.05,
            "lower",
        ),
        Row(
            f"Ray Train, 2 workers of {max(1, sizes.threads // 2)} threads, against local mode",
            f"{sizes.ray_batch / two.median:.1f} images/s",
            images,
            local.median / two.median,
        ),
    ]


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "losses": losses,
    "training": training,
    "files": files,
    "grad_cache": grad_cache,
    "ray": ray,
}


def run_clip(arguments: Sequence[str]) -> list[Row]:
    """Parse, measure, append the table; the rows."""
    options = read_options("clip", __doc__, list(PARTS), arguments)
    with tempfile.TemporaryDirectory(prefix="fmray-benchmark-") as folder:
        bench = Bench(OPEN_CLIP.python(PARITY), Path(folder), QUICK if options.quick else FULL)
        bench.make()
        return run_parts(PARTS, options, bench)
