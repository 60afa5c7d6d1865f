"""The doors of fmray as one command. `jobs/*.py` call the same functions.

Each door parses its configuration before it imports torch, opens one room, and turns every expected error into one line.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence

from fmray.config.answers import AnswersConfig, AnswersEvaluateRunConfig
from fmray.config.demo import DemoConfig
from fmray.config.demo_recipes import DEMO_RECIPES
from fmray.config.index import IndexConfig
from fmray.config.loading import HelpRequested, load_config, load_task
from fmray.config.recipes import SERVE_RECIPES
from fmray.config.reward import RewardModelConfig
from fmray.config.reward_recipes import REWARD_MODEL_RECIPES
from fmray.config.rlhf import RlhfConfig
from fmray.config.rlhf_recipes import RLHF_RECIPES
from fmray.config.serving import ServeConfig
from fmray.config.sweep import SweepConfig
from fmray.config.sweep_recipes import SWEEP_RECIPES
from fmray.config.tasks import EVALUATE_TASKS, PRETRAIN_TASKS
from fmray.errors import TEMPORARY_FAILURE, ConfigError, FmrayError

Arguments = Sequence[str]


def pretrain(arguments: Arguments) -> int:
    """Train on pictures and words: a dual encoder (CLIP, SigLIP), a VQA model, a multimodal LLM."""
    config = load_task(PRETRAIN_TASKS, arguments, door="fmray pretrain")
    from fmray.runtime.launch import Work, launch
    from fmray.training.preflight import check_answers, check_pretrain

    work: Work
    if isinstance(config, AnswersConfig):
        from fmray.training.answers import train_answers as work

        check_answers(config)
    else:
        from fmray.training.loop import pretrain as work

        check_pretrain(config)
    outcome = launch(work, config, steps=config.train.steps)
    say(f"{outcome.steps} steps; checkpoints and metrics in {config.run.storage}/{config.run.name}")
    if outcome.finished and isinstance(config, AnswersConfig):
        from fmray.pipeline.answers_report import write_answers_report
        from fmray.runtime.run_folder import RunFolder

        say(f"measured on the test split: {write_answers_report(RunFolder.of(config.run))}")
    return 0 if outcome.finished else TEMPORARY_FAILURE


def reward(arguments: Arguments) -> int:
    """Train a reward model on labelled texts, pairs of answers or rankings."""
    config = load_config(RewardModelConfig, REWARD_MODEL_RECIPES, arguments, door="fmray reward")
    from fmray.runtime.launch import launch
    from fmray.training.preflight import check_reward
    from fmray.training.reward_model import train_reward_model as work

    check_reward(config)
    outcome = launch(work, config, steps=config.train.steps)
    say(
        f"{outcome.steps} steps; model, metrics and evaluation.json in {config.run.storage}/{config.run.name}"
    )
    return 0 if outcome.finished else TEMPORARY_FAILURE


def rlhf(arguments: Arguments) -> int:
    """Teach a language model by PPO under weighted rewards, with actor pools for rollouts, reference and rewards."""
    config = load_config(RlhfConfig, RLHF_RECIPES, arguments, door="fmray rlhf")
    from fmray.rlhf.loop import train_ppo as work
    from fmray.rlhf.roles import pool_plan
    from fmray.runtime.launch import launch

    outcome = launch(work, config, steps=config.train.iterations, pools=pool_plan(config))
    say(
        f"{outcome.steps} iterations; checkpoints, metrics and samples in {config.run.storage}/{config.run.name}"
    )
    return 0 if outcome.finished else TEMPORARY_FAILURE


def sweep(arguments: Arguments) -> int:
    """Run a door many times with keys from a space, and show which trade-offs nothing beats."""
    config = load_config(SweepConfig, SWEEP_RECIPES, arguments, door="fmray sweep")
    from fmray.pipeline.sweep import run_sweep

    end = run_sweep(config, say)
    say(end.text)
    return 0 if end.finished else TEMPORARY_FAILURE


def evaluate(arguments: Arguments) -> int:
    """Measure a saved model on a test split: retrieval, or with task=answers its answers beside blind baselines."""
    config = load_task(EVALUATE_TASKS, arguments, door="fmray evaluate")
    from fmray.runtime.launch import Work, launch
    from fmray.runtime.run_folder import RunFolder

    work: Work
    if isinstance(config, AnswersEvaluateRunConfig):
        from fmray.evaluation.answer_run import evaluate_saved as work
    else:
        from fmray.evaluation.embed import evaluate as work
    launch(work, config)
    folder = RunFolder.of(config.run)
    for name, value in json.loads(folder.read_text("evaluation.json"))["metrics"].items():
        say(f"{name:<32}{value:.4f}")
    say(f"written to {folder.url}/evaluation.json")
    return 0


def serve(arguments: Arguments) -> int:
    """Answer HTTP requests with a saved model."""
    config = load_config(ServeConfig, SERVE_RECIPES, arguments, door="fmray serve")
    from fmray.serving.deploy import serve as run

    run(config, say)
    return 0


def keys(arguments: Arguments) -> int:
    """Keys of an endpoint: `fmray keys add NAME --file FILE` prints one, once; `list`, `remove`; running endpoints notice."""
    from fmray.serving.keys import run_keys

    for line in run_keys(arguments):
        say(line)
    return 0


def index(arguments: Arguments) -> int:
    """Embed pictures into an index that `/v1/search` answers from."""
    config = load_config(IndexConfig, {}, arguments, door="fmray index")
    from fmray.pipeline.index import build_index

    built = build_index(config)
    if built.facts is None:
        say("stopped; the same command goes on from here")
        return TEMPORARY_FAILURE
    facts = built.facts
    say(
        f"{facts.count} pictures, {built.left_out} left out, {built.seconds:.1f} s: {config.output} ({facts.kind})"
    )
    return 0


def demo(arguments: Arguments) -> int:
    """The whole road: CLIP trained, measured and served; a reward model, PPO under it, a verdict, a sweep; a report."""
    given = any(word.partition("=")[0] == "--recipe" for word in arguments)
    words = arguments if given else ["--recipe", "demo", *arguments]
    config = load_config(DemoConfig, DEMO_RECIPES, words, door="fmray demo")
    from fmray.pipeline.demo import run_demo
    from fmray.pipeline.demo_screen import screen

    say(screen(run_demo(config)))
    return 0


def assets(arguments: Arguments) -> int:
    """List the pinned data and weights, or fetch them: `fmray assets [fetch [NAME …]]`."""
    from fmray.assets import fetch, list_assets

    names = list(arguments)
    if names and names[0] == "fetch":
        for name in names[1:] or [row.name for row in list_assets()]:
            say(f"{name}: {fetch(name)}")
        return 0
    for row in list_assets():
        say(
            f"{row.name:<24}{'cached' if row.cached else '-':<8}{row.requirement}\n    {row.what}\n    licence: {row.licence}"
        )
    return 0


def benchmark(arguments: Arguments) -> int:
    """Measure fmray beside a peer in one run: `fmray benchmark clip|ppo|vqa|serve [--quick] [--parts …] [--results FILE]`."""
    name = arguments[0] if arguments else ""
    if name == "clip":
        from fmray.benchmarks.clip import run_clip as run
    elif name == "ppo":
        from fmray.benchmarks.ppo import run_ppo as run
    elif name == "serve":
        from fmray.benchmarks.serve import run_serve as run
    elif name == "vqa":
        from fmray.benchmarks.vqa import run_vqa as run
    else:
        cure = "write 'clip', 'ppo', 'vqa' or 'serve', and --help after it for its options"
        raise ConfigError("benchmark", " ".join(arguments), cure)
    for row in run(arguments[1:]):
        say("  ".join(cell for cell in row.cells if cell))
    return 0


def check(arguments: Arguments) -> int:
    """Check Serve configs, KubeRay manifests and cluster-launcher files strictly, without a cluster: `fmray check FILE…`."""
    from fmray.checks.files import USAGE, check_files, read_order

    if {"--help", "-h"} & {*arguments}:
        raise HelpRequested(USAGE)
    order = read_order(arguments)
    found = check_files(order, tuple(DOORS))
    if order.as_json:
        say(json.dumps([finding.as_json() for finding in found], indent=2, ensure_ascii=False))
    else:
        for finding in found:
            say(str(finding))
    errors = sum(finding.severity == "error" for finding in found)
    if not found and not order.as_json:
        say(f"{len(order.files)} {'file' if len(order.files) == 1 else 'files'} checked, nothing found")
    return 1 if errors else 0


DOORS: dict[str, Callable[[Arguments], int]] = {
    "pretrain": pretrain,
    "reward": reward,
    "rlhf": rlhf,
    "sweep": sweep,
    "evaluate": evaluate,
    "serve": serve,
    "index": index,
    "keys": keys,
    "demo": demo,
    "assets": assets,
    "benchmark": benchmark,
    "check": check,
}


def door(run: Callable[[Arguments], int], arguments: Arguments | None = None) -> int:
    """Open a door: its exit status; an expected error is one line on standard error and status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except HelpRequested as text:
        say(str(text))
        return 0
    except FmrayError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def say(text: str) -> None:
    """A line on standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Arguments | None = None) -> int:
    """`fmray DOOR …`"""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in DOORS:
        return door(DOORS[words[0]], words[1:])
    if words and words[0] == "--version":
        from fmray import __version__

        say(f"fmray {__version__}")
        return 0
    lines = ["usage: fmray DOOR [--recipe NAME] [--config FILE] [key=value …]", "", "doors:"]
    lines += [f"  {name:<12}{(run.__doc__ or '').splitlines()[0]}" for name, run in DOORS.items()]
    lines += ["", "fmray DOOR --help lists a door's recipes and keys."]
    if words and words[0] not in ("--help", "-h"):
        sys.stderr.write(f"error: unknown door {words[0]!r}; there are: {', '.join(DOORS)}\n")
        return 1
    say("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
