"""fmray's PPO arithmetic beside two versions of trl, on the same weights and the same tokens: the largest differences.

trl runs in an environment of its own (`trl_side/`) and writes down what its own code computed. Here the same models run under
our transformers, masks come from our lengths, and `compat_rules` do the rest; the old log-probabilities and values that enter
credit are trl's, so that a difference of the arithmetic is not hidden behind one of the models.

B rows  P prompt  T response tokens  V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fmray.benchmarks.peers import run_peer_script
from fmray.rlhf.credit import Credit, credit
from fmray.rlhf.losses import policy_loss, token_entropy, token_logp, token_mean, total_loss, value_loss
from fmray.rlhf.presets import PpoRules, compat_rules

ROWS, VOCABULARY, EOS = 16, 24, 1
T5_MODEL: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    **{"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": EOS},
    **{"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
}
T5_PPO: dict[str, Any] = {"batch_size": ROWS, "mini_batch_size": 4, "ppo_epochs": 4, "seed": 0}
T5_RATES = (3e-4, 1e-3, 0.3)
"""Learning rate of each step; the last drives ratios beyond trl's threshold."""
GPT2_MODEL: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_labels": 1},
    **{"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "bos_token_id": None},
    **{"pad_token_id": VOCABULARY - 1, "eos_token_id": EOS},
}
GPT2_PPO: dict[str, Any] = {
    **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": ROWS // 4, "num_mini_batches": 1},
    **{"total_episodes": ROWS, "num_ppo_epochs": 4, "response_length": 10, "temperature": 0.7, "seed": 0},
    **{"stop_token": "eos", "learning_rate": 5e-3, "bf16": False, "use_cpu": True, "report_to": "none"},
    **{"num_sample_generations": 0, "gradient_checkpointing": False, "disable_tqdm": True},
    **{"save_strategy": "no", "local_rollout_forward_batch_size": 8},
}


@dataclass(slots=True)
class Differences:
    """Largest difference of each kind of figure; relative where the figures are above 1."""

    worst: dict[str, float] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    """Situations that the batch is meant to hold, and how often it did."""

    def note(self, what: str, ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> None:
        """Compare, where `mask` holds."""
        if mask is not None:
            ours, theirs = ours[mask], theirs[mask]
        size = max(1.0, float(theirs.detach().double().abs().max()))
        gap = float((ours.detach().double() - theirs.detach().double()).abs().max()) / size
        self.worst[what] = max(self.worst.get(what, 0.0), gap)

    def count(self, what: str, times: Tensor | int) -> None:
        """Count a situation."""
        self.seen[what] = self.seen.get(what, 0) + int(times)


def named(tensors: dict[str, Tensor], *prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    start = "/".join(prefix) + "/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def weights_of(name: str, model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all weights under a name."""
    return {f"{name}/{key}": value.detach().clone() for key, value in model.state_dict().items()}


def ask(
    python: Path, script: str, folder: Path, settings: dict[str, Any], given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Have a peer's script work in a folder; what it found."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "given.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(given, folder / "given.safetensors")
    run_peer_script(python, f"trl_side/{script}", str(folder))
    return load_file(folder / "found.safetensors")


def drawn_prompts(draw: torch.Generator, count: int) -> dict[str, Tensor]:
    """Prompts of 3 to 7 tokens, none of them special."""
    return {
        "prompt_ids": torch.randint(3, VOCABULARY - 1, (count, 7), generator=draw),
        "prompt_lengths": torch.randint(3, 8, (count,), generator=draw),
    }


def compare_losses(
    differences: Differences,
    theirs: dict[str, Tensor],
    given: Credit,
    old: tuple[Tensor, Tensor],
    rules: PpoRules,
) -> None:
    """One micro-batch: `theirs` holds logp, values, losses, slopes, shares; `given` and `old` (logp, values) are of its rows."""
    assert given.returns_BT is not None
    logp_BT, values_BT = theirs["logp"].clone().requires_grad_(), theirs["values"].clone().requires_grad_()
    policy = policy_loss(logp_BT, old[0], given.advantages_BT, given.policy_mask_BT, rules.loss.clip)
    value = value_loss(values_BT, old[1], given.returns_BT, given.value_mask_BT, rules.loss.value_clip)
    total = total_loss(policy, value, rules.loss)
    slopes = torch.autograd.grad(total, [logp_BT, values_BT])
    differences.note("total loss", total, theirs["total_loss"])
    differences.note("loss gradient for log-probabilities", slopes[0], theirs["logp_slope"])
    differences.note("loss gradient for values", slopes[1], theirs["values_slope"])
    shares = policy.sums.means() | value.sums.means()
    for name in ("clip_fraction", "value_clip_fraction"):
        differences.note("clipped shares", torch.tensor(shares[name]), theirs[name])
    skipped = bool(theirs["total_loss"] == 0)
    differences.count("micro-batches beyond the ratio threshold", skipped)
    differences.count("micro-batches with clipped ratios", shares["clip_fraction"] > 0)
    differences.count("micro-batches with clipped values", shares["value_clip_fraction"] > 0)
    if not skipped:
        differences.note("policy loss", policy.loss, theirs["policy_loss"])
        differences.note("value loss", value.loss, theirs["value_loss"])


def rows_of(given: Credit, rows: Tensor) -> Credit:
    """Some responses' credit."""
    values = {name: getattr(given, name) for name in given.__slots__}
    return replace(given, **{name: value[rows] for name, value in values.items() if value is not None})


# ------------------------------------------------------------------------------------------------------------- trl 0.11, T5


def compare_trl_0_11(python: Path, folder: Path) -> Differences:
    """Three steps of `PPOTrainer` on a small random T5 against `compat_rules("trl-0.11")`."""
    torch.manual_seed(0)
    policy, reference = (T5ForConditionalGeneration(T5Config(**T5_MODEL)).eval() for _ in range(2))
    head = torch.nn.Linear(T5_MODEL["d_model"], 1)
    draw = torch.Generator().manual_seed(1)
    lengths_B = torch.randint(2, 10, (ROWS,), generator=draw)
    ids_BT = torch.randint(3, VOCABULARY, (ROWS, int(lengths_B.max())), generator=draw)
    ids_BT[torch.arange(0, ROWS, 2), lengths_B[::2] - 1] = EOS  # every other answer ends by itself
    scores_B = 2 * torch.randn(ROWS, generator=draw)
    given = drawn_prompts(draw, ROWS) | {
        "response_ids": ids_BT,
        "response_lengths": lengths_B,
        "scores": scores_B,
    }
    weights = weights_of("policy", policy) | weights_of("reference", reference) | weights_of("head", head)
    settings = {"model": T5_MODEL, "ppo": T5_PPO, "learning_rates": T5_RATES}
    found = ask(python, "ppo_0_11.py", folder, settings, given | weights)

    differences, rules = Differences(), compat_rules("trl-0.11")
    mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    _compare_t5_forward(differences, given, (policy, reference, head), named(found, "0", "credit"), mask_BT)
    controller = rules.kl
    for step in range(len(T5_RATES)):
        theirs = named(found, str(step), "credit")
        old = (theirs["logp"], theirs["values"])
        ours = credit(
            *(theirs["scores"], torch.ones(ROWS), old[0], theirs["reference_logp"], old[1]),
            *(mask_BT, torch.arange(ROWS), rules.credit, controller.coefficient),
        )
        differences.note("masks", ours.policy_mask_BT, theirs["mask"])
        assert ours.returns_BT is not None
        for what, mine in (("rewards", ours.rewards_BT), ("kl", ours.kl_BT), ("returns", ours.returns_BT)):
            differences.note(what, mine, theirs[what], ours.policy_mask_BT)
        differences.note("advantages", ours.advantages_BT, theirs["advantages"], ours.policy_mask_BT)
        differences.note("coefficient", torch.tensor(controller.coefficient), theirs["coefficient"])
        after = named(found, str(step), "step")
        kl = ours.sums().means()["kl"]
        differences.note("sequence kl", torch.tensor(kl), after["sequence_kl"])
        controller = controller.updated(kl, ROWS)
        differences.note("coefficient", torch.tensor(controller.coefficient), after["coefficient"])
        for number in range(T5_PPO["ppo_epochs"] * ROWS // T5_PPO["mini_batch_size"]):
            _compare_t5_losses(
                differences, named(found, str(step), f"loss{number:02d}"), ours, old, ids_BT, rules
            )
    return differences


def _compare_t5_forward(
    differences: Differences,
    given: dict[str, Tensor],
    models: tuple[T5ForConditionalGeneration, T5ForConditionalGeneration, torch.nn.Linear],
    theirs: dict[str, Tensor],
    mask_BT: Tensor,
) -> None:
    """Our transformers, our layout: the decoder reads its start token and the answer without its last token."""
    policy, reference, head = models
    ids_BT = given["response_ids"]
    inputs = {
        "input_ids": given["prompt_ids"],
        "attention_mask": (torch.arange(7) < given["prompt_lengths"][:, None]).long(),
        "decoder_input_ids": torch.nn.functional.pad(ids_BT[:, :-1], (1, 0), value=0),
    }
    with torch.no_grad():
        out = policy(**inputs, output_hidden_states=True)
        values_BT = head(out.decoder_hidden_states[-1]).squeeze(-1)
        reference_logp_BT = token_logp(reference(**inputs).logits, ids_BT)
        logp_BT = token_logp(out.logits, ids_BT)
    differences.note("log-probabilities", logp_BT, theirs["logp"], mask_BT)
    differences.note("reference log-probabilities", reference_logp_BT, theirs["reference_logp"], mask_BT)
    differences.note("values", values_BT, theirs["values"], mask_BT)


def _compare_t5_losses(
    differences: Differences,
    theirs: dict[str, Tensor],
    ours: Credit,
    old: tuple[Tensor, Tensor],
    ids_BT: Tensor,
    rules: PpoRules,
) -> None:
    """A mini-batch; its rows are found by their old log-probabilities."""
    same = (theirs["old_logp"][:, None] == old[0][None]).all(dim=-1)
    assert (same.sum(dim=1) == 1).all()
    rows = same.int().argmax(dim=1)
    given = rows_of(ours, rows)
    theirs["value_loss"] = theirs["weighted_value_loss"] / rules.loss.value_coefficient
    theirs["total_loss"] = theirs["policy_loss"] + theirs["weighted_value_loss"]
    compare_losses(differences, theirs, given, (old[0][rows], old[1][rows]), rules)
    mask_BT = given.policy_mask_BT
    differences.note("log-probabilities", token_logp(theirs["logits"], ids_BT[rows]), theirs["logp"], mask_BT)
    entropy = token_mean(token_entropy(theirs["logits"]), mask_BT)
    differences.note("entropy", entropy, theirs["entropy"])
    approx_kl = token_mean((theirs["logp"] - theirs["old_logp"]).square() / 2, mask_BT)
    differences.note("approximate kl", approx_kl, theirs["approx_kl"])


# ---------------------------------------------------------------------------------------------------------- trl 1.12, GPT-2


def compare_trl_1_12(python: Path, folder: Path, *, all_options: bool = False) -> Differences:
    """An iteration of `PPOTrainer.train` on small random GPT-2s against `compat_rules("trl-1.12")`.

    all_options: with its missing-EOS penalty, whitened rewards and k3, which are off by default.
    """
    torch.manual_seed(0)
    models = {name: GPT2LMHeadModel(GPT2Config(**GPT2_MODEL)).eval() for name in ("policy", "reference")}
    models |= {
        name: GPT2ForSequenceClassification(GPT2Config(**GPT2_MODEL)).eval() for name in ("reward", "value")
    }
    for model in models.values():
        _sharpen(model)
    with torch.no_grad():
        for near, weight in zip(models["reference"].parameters(), models["policy"].parameters(), strict=True):
            near.copy_(weight + 0.02 * torch.randn_like(weight))
    # more prompts than it takes: at the end of its data accelerate steps at every micro-batch
    given = drawn_prompts(torch.Generator().manual_seed(2), 4 * ROWS)
    options = (
        {"missing_eos_penalty": 1.0, "whiten_rewards": True, "kl_estimator": "k3"} if all_options else {}
    )
    settings = {"model": GPT2_MODEL, "ppo": GPT2_PPO | options}
    for name, model in models.items():
        given |= weights_of(name, model)
    found = ask(python, "ppo_1_12.py", folder, settings, given)

    differences, rules = Differences(), compat_rules("trl-1.12")
    if all_options:
        changed = replace(rules.credit, missing_eos=("penalty", 1.0), whiten_rewards=True, kl="k3")
        rules = replace(rules, credit=changed)
    samples, theirs = named(found, "samples"), named(found, "credit")
    ids_BT = samples["responses"]
    ends_BT = ids_BT == EOS
    mask_BT = ends_BT.cumsum(dim=1) - ends_BT.long() == 0  # up to the first EOS, and it
    ended_B = ends_BT.any(dim=1)
    differences.count("answers that ended", ended_B.sum())
    differences.count("answers that did not", (~ended_B).sum())
    old = (samples["logprobs"], samples["values"])
    ours = credit(
        *(samples["scores"], ended_B, old[0], samples["ref_logprobs"], old[1], mask_BT),
        *(torch.arange(ROWS), rules.credit, rules.kl.coefficient),
    )
    _compare_gpt2_forward(differences, models, samples, ours, rules)
    differences.note("masks", ours.policy_mask_BT, ~theirs["padding_mask"])
    differences.note("masks", ours.value_mask_BT, ~theirs["padding_mask_p1"])
    differences.note("scores after the missing-EOS rule", ours.scores_B, theirs["scores"])
    differences.note("kl", ours.kl_BT, theirs["kl"])
    if not all_options:  # trl's are whitened in place there, ours are kept as they were
        differences.note("rewards", ours.rewards_BT, theirs["rewards"])
    assert ours.returns_BT is not None
    differences.note("advantages", ours.advantages_BT, theirs["advantages"])
    differences.note("returns", ours.returns_BT, theirs["returns"])
    for number in range(GPT2_PPO["num_ppo_epochs"] * GPT2_PPO["gradient_accumulation_steps"]):
        _compare_gpt2_losses(differences, named(found, f"loss{number:02d}"), ours, old, ids_BT, rules)
    return differences


def _sharpen(model: GPT2LMHeadModel | GPT2ForSequenceClassification) -> None:
    """Spread logits, values and scores; EOS now and then; never the padding token, which trl 1.12 takes for the end."""
    with torch.no_grad():
        backbone = model.transformer
        for weight in backbone.parameters():
            if weight.ndim == 2:
                weight *= 8
        backbone.wte.weight[:, 0] = 0  # one direction of the output is a bias of our choice
        backbone.ln_f.bias[0] = 5
        backbone.wte.weight[EOS, 0] = 0.1
        backbone.wte.weight[GPT2_MODEL["pad_token_id"]] = 0
        backbone.wte.weight[GPT2_MODEL["pad_token_id"], 0] = -10
        if isinstance(model, GPT2ForSequenceClassification):
            model.score.weight *= 20


def _compare_gpt2_forward(
    differences: Differences,
    models: dict[str, Any],
    samples: dict[str, Tensor],
    ours: Credit,
    rules: PpoRules,
) -> None:
    """One forward pass of each model over prompts and answers, against what generation and trl's own passes gave."""
    queries_BP, ids_BT = samples["queries"], samples["responses"]
    prompt = queries_BP.shape[1]
    real = torch.cat([queries_BP != GPT2_MODEL["pad_token_id"], ours.policy_mask_BT], dim=1).long()
    inputs = {
        "input_ids": torch.cat([queries_BP, ids_BT], dim=1) * real,
        "attention_mask": real,
        "position_ids": (real.cumsum(dim=1) - 1).clamp(min=0),
    }
    temperature = GPT2_PPO["temperature"] + rules.loss.temperature_offset
    mask_BT, last_B = ours.policy_mask_BT, ours.policy_mask_BT.sum(dim=1) - 1
    with torch.no_grad():
        logp_BT, reference_logp_BT = (
            token_logp(models[name](**inputs).logits[:, prompt - 1 : -1], ids_BT, temperature)
            for name in ("policy", "reference")
        )
        values, scores = (
            models[name].score(models[name].transformer(**inputs).last_hidden_state).squeeze(-1)
            for name in ("value", "reward")
        )
    differences.note("log-probabilities", logp_BT, samples["logprobs"], mask_BT)
    differences.note("reference log-probabilities", reference_logp_BT, samples["ref_logprobs"], mask_BT)
    differences.note("values", values[:, prompt - 1 : -1], samples["values"], ours.value_mask_BT)
    differences.note("scores", scores[torch.arange(ROWS), prompt + last_B], samples["scores"])


def _compare_gpt2_losses(
    differences: Differences,
    theirs: dict[str, Tensor],
    ours: Credit,
    old: tuple[Tensor, Tensor],
    ids_BT: Tensor,
    rules: PpoRules,
) -> None:
    """A micro-batch; its logits are already divided by the temperature."""
    rows = theirs["rows"]
    given = rows_of(ours, rows)
    logp_BT = token_logp(theirs["logits"], ids_BT[rows])
    differences.note("log-probabilities", logp_BT, theirs["new_logprobs"], given.policy_mask_BT)
    renamed = {"logp": logp_BT, "values": theirs["vpred"], "total_loss": theirs["loss"]}
    renamed |= {"policy_loss": theirs["pg_loss"], "value_loss": theirs["vf_loss"]}
    compare_losses(differences, theirs | renamed, given, (old[0][rows], old[1][rows]), rules)
