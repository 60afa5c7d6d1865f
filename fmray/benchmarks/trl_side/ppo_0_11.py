"""PPO steps of trl 0.11.4 on a given batch and T5, with everything its own methods were given and answered.

`python ppo_0_11.py FOLDER` reads given.json and given.safetensors there and writes found.safetensors. Run by the peer
environment's Python; nothing of fmray is imported. Each method is trl's own: a subclass calls it and writes down what went by.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer


class Witness(PPOTrainer):  # type: ignore[misc]
    """PPOTrainer that writes down arguments and results of the three methods that hold its arithmetic."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.found: dict[str, Tensor] = {}
        self.steps, self.losses = 0, 0

    def note(self, where: str, **tensors: Tensor) -> None:
        """Under `<step>/<where>/<name>`."""
        for name, tensor in tensors.items():
            self.found[f"{self.steps}/{where}/{name}"] = tensor.detach().clone().contiguous()

    def compute_rewards(self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor) -> Any:
        """Scores and KL penalties as per-token rewards."""
        self.note("credit", scores=scores, logp=logprobs, reference_logp=ref_logprobs, mask=masks)
        self.note("credit", coefficient=torch.tensor(float(self.kl_ctl.value), dtype=torch.float64))
        rewards, penalties, kls = super().compute_rewards(scores, logprobs, ref_logprobs, masks)
        self.note("credit", rewards=rewards, kl=kls)
        return rewards, penalties, kls

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> Any:
        """GAE and whitening."""
        self.note("credit", values=values)
        kept, advantages, returns = super().compute_advantages(values, rewards, mask)
        self.note("credit", advantages=advantages, returns=returns)
        return kept, advantages, returns

    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> Any:
        """Both losses of a mini-batch, and the gradient of their sum."""
        where = f"loss{self.losses:02d}"
        self.note(
            where, old_logp=old_logprobs, old_values=values, logits=logits, logp=logprobs, values=vpreds
        )
        self.note(where, mask=mask, advantages=advantages, returns=returns)
        policy, value, stats = super().loss(
            old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
        )
        slopes = torch.autograd.grad(policy + value, [logprobs, vpreds], retain_graph=True)
        self.note(
            where, policy_loss=policy, weighted_value_loss=value, logp_slope=slopes[0], values_slope=slopes[1]
        )
        self.note(where, clip_fraction=stats["policy/clipfrac"], approx_kl=stats["policy/approxkl"])
        self.note(where, value_clip_fraction=stats["val/clipfrac"], entropy=stats["policy/entropy"])
        self.losses += 1
        return policy, value, stats

    def after_step(self, stats: dict[str, Any]) -> None:
        """What a whole step reported."""
        self.note(
            "step",
            sequence_kl=torch.tensor(float(stats["objective/kl"]), dtype=torch.float64),
            coefficient=torch.tensor(float(self.kl_ctl.value), dtype=torch.float64),
        )
        self.steps, self.losses = self.steps + 1, 0


def model_of(settings: dict[str, Any], tensors: dict[str, Tensor], name: str) -> Any:
    """A T5 with a value head and the given weights."""
    model = AutoModelForSeq2SeqLMWithValueHead(T5ForConditionalGeneration(T5Config(**settings["model"])))
    weights = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
    model.pretrained_model.load_state_dict(weights)
    model.v_head.summary.load_state_dict({"weight": tensors["head/weight"], "bias": tensors["head/bias"]})
    model.is_peft_model = False
    return model


def main(folder: Path) -> None:
    """The given number of steps on the same batch, at the given learning rates."""
    settings = json.loads((folder / "given.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "given.safetensors")
    words = {f"w{i}": i for i in range(settings["model"]["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "w2")), pad_token="w0", eos_token="w1"
    )
    trainer = Witness(
        PPOConfig(**settings["ppo"]),
        model_of(settings, tensors, "policy"),
        model_of(settings, tensors, "reference"),
        tokenizer,
    )
    prompts = [
        ids[:length] for ids, length in zip(tensors["prompt_ids"], tensors["prompt_lengths"], strict=True)
    ]
    start = torch.tensor([settings["model"]["decoder_start_token_id"]])
    responses = [
        torch.cat([start, ids[:length]])
        for ids, length in zip(tensors["response_ids"], tensors["response_lengths"], strict=True)
    ]
    for rate in settings["learning_rates"]:
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        trainer.after_step(trainer.step(prompts, responses, list(tensors["scores"])))
    save_file(trainer.found, folder / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
