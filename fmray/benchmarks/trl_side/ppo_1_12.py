"""An iteration of trl 1.12.0's PPOTrainer.train on given prompts and GPT-2s, with the values of its variables on the way.

`python ppo_1_12.py FOLDER` reads given.json and given.safetensors there and writes found.safetensors. Run by the peer
environment's Python; nothing of fmray is imported. `train` is one function of 400 lines, so a tracer reads its variables as
they are just before certain of its lines run; nothing of its arithmetic is written again here.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer

Variables = dict[str, Any]
FOUND: dict[str, Tensor] = {}


def note(where: str, variables: Variables, names: dict[str, str]) -> None:
    """Copies of some variables (ours → theirs) under `<where>/<ours>`."""
    for ours, theirs in names.items():
        FOUND[f"{where}/{ours}"] = torch.as_tensor(variables[theirs]).detach().clone().contiguous()


def note_samples(variables: Variables) -> None:
    """What was sampled and what was said of it, before any mask or rule."""
    names = (
        "queries",
        "responses",
        "postprocessed_responses",
        "logprobs",
        "ref_logprobs",
        "values",
        "scores",
    )
    note("samples", variables, {name: name for name in names})


def note_credit(variables: Variables) -> None:
    """Once, before the first epoch."""
    if "credit/advantages" not in FOUND:
        names = ("kl", "non_score_reward", "rewards", "scores", "advantages", "returns", "values")
        note("credit", variables, {name: name for name in (*names, "padding_mask", "padding_mask_p1")})


def note_loss(variables: Variables) -> None:
    """A micro-batch before its backward pass, with the gradient of its loss."""
    where = f"loss{sum(name.endswith('/loss') for name in FOUND):02d}"
    names = ("logits", "new_logprobs", "vpred", "pg_loss", "vf_loss", "loss")
    note(where, variables, {name: name for name in names} | {"rows": "micro_batch_inds"})
    slopes = torch.autograd.grad(
        variables["loss"], [variables["new_logprobs"], variables["vpred"]], retain_graph=True
    )
    note(
        where,
        {"logp_slope": slopes[0], "values_slope": slopes[1]},
        {n: n for n in ("logp_slope", "values_slope")},
    )


def note_statistics(variables: Variables) -> None:
    """The same micro-batch's clipped shares."""
    where = f"loss{sum(name.endswith('/loss') for name in FOUND) - 1:02d}"
    note(where, variables, {"clip_fraction": "pg_clipfrac", "value_clip_fraction": "vf_clipfrac"})


WITNESSES: dict[str, Callable[[Variables], None]] = {
    "contain_eos_token = torch.any(": note_samples,
    "b_inds = np.random.permutation(": note_credit,
    "accelerator.backward(loss)": note_loss,
    "gradient_accumulation_idx += 1": note_statistics,
}
"""How a line of `train` begins → who looks at the variables just before it runs."""


def watch(function: Callable[..., Any], call: Callable[[], Any]) -> None:
    """`call()`, with the witnesses looking on whenever `function` is about to run one of their lines."""
    source, first = inspect.getsourcelines(function)
    lines = {
        first + number: witness
        for number, text in enumerate(source)
        for beginning, witness in WITNESSES.items()
        if text.strip().startswith(beginning)
    }
    assert len(lines) == len(WITNESSES), "these lines are not in this version of trl"

    def at_line(frame: FrameType, event: str, _: object) -> Any:
        if event == "line" and frame.f_lineno in lines:
            lines[frame.f_lineno](frame.f_locals)
        return at_line

    sys.settrace(lambda frame, _event, _: at_line if frame.f_code is function.__code__ else None)
    try:
        call()
    finally:
        sys.settrace(None)


def model_of(kind: Any, settings: Variables, tensors: dict[str, Tensor], name: str) -> Any:
    """A GPT-2 with the given weights."""
    model = kind(GPT2Config(**settings["model"]))
    weights = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


def main(folder: Path) -> None:
    """One iteration."""
    settings = json.loads((folder / "given.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "given.safetensors")
    words = {f"w{i}": i for i in range(settings["model"]["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "w2")),
        pad_token=f"w{settings['model']['pad_token_id']}",
        eos_token=f"w{settings['model']['eos_token_id']}",
        padding_side="left",
    )
    lengths = tensors["prompt_lengths"].tolist()
    prompts = [ids[:n].tolist() for ids, n in zip(tensors["prompt_ids"], lengths, strict=True)]
    trainer = PPOTrainer(
        PPOConfig(output_dir=str(folder / "run"), **settings["ppo"]),
        processing_class=tokenizer,
        model=model_of(GPT2LMHeadModel, settings, tensors, "policy"),
        ref_model=model_of(GPT2LMHeadModel, settings, tensors, "reference"),
        reward_model=model_of(GPT2ForSequenceClassification, settings, tensors, "reward"),
        value_model=model_of(GPT2ForSequenceClassification, settings, tensors, "value"),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts}),
    )
    watch(PPOTrainer.train, trainer.train)
    save_file(FOUND, folder / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
