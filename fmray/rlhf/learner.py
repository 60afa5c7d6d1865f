"""What changes while PPO learns: weights and moments, and what a resumed run must know beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fmray.config.rlhf import RlhfConfig
from fmray.models.freezing import ParameterGroup
from fmray.models.language import Language, speaker
from fmray.rlhf.actor_critic import ActorCritic, build_actor_critic, learning_groups
from fmray.rlhf.experience import Crew
from fmray.rlhf.kl import AdaptiveKl, KlController, kl_from_state, kl_state
from fmray.rlhf.presets import PpoRules
from fmray.rlhf.rewards import RewardBank
from fmray.rlhf.rules import rules_of
from fmray.runtime.context import Context
from fmray.training.averaging import WeightAverage, whole_weights
from fmray.training.checkpoint import Memory, SaveModel
from fmray.training.engine import Engine, make_engine


@dataclass(slots=True)
class PpoLearner:
    """`Learner` of PPO. What it remembers: KL coefficient, reward normalisers, optimizer steps, samples in flight."""

    config: RlhfConfig
    model: ActorCritic
    language: Language
    groups: list[ParameterGroup]
    engine: Engine
    rules: PpoRules
    kl: KlController
    bank: RewardBank
    crew: Crew
    optimizer_steps: int = 0
    starting_scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and deviation of each raw reward of the starting policy on the held-out prompts: the unit of `eval/score`."""
    average: WeightAverage | None = None

    def remember(self) -> Memory:
        texts, tensors = self.crew.remembered()
        values = {
            "kl": kl_state(self.kl),
            "rewards": self.bank.state(),
            "optimizer_steps": self.optimizer_steps,
            "starting_scores": self.starting_scores,
            "in_flight": texts,
        }
        return Memory(values, tensors)

    def recall(self, memories: list[Memory]) -> None:
        first = memories[0].values
        kept = kl_from_state(first["kl"])
        if isinstance(self.kl, AdaptiveKl) and isinstance(kept, AdaptiveKl):
            self.kl = replace(
                self.kl, coefficient=kept.coefficient
            )  # all else is the configuration's, as a fixed one is
        self.bank.load(first["rewards"])
        self.optimizer_steps = int(first["optimizer_steps"])
        self.starting_scores = {name: (mean, std) for name, (mean, std) in first["starting_scores"].items()}
        self.engine.load_step(self.optimizer_steps)  # several in each iteration
        texts = [row for memory in memories for row in memory.values["in_flight"]]
        tensors: dict[str, Tensor] = {}
        for memory in memories:
            tensors |= memory.tensors
        self.crew.recall(texts, tensors)

    def export(self) -> SaveModel:
        """The policy as it would be saved now; a collective. Its writer is for rank 0 alone.

        A LoRA adapter is merged into the model, and saved beside it in peft's own format under `adapter/`.
        """
        policy, config = self.model.policy, self.config
        kept = set(policy.state_dict())
        whole = {
            name: value
            for name, value in whole_weights(policy, self.engine, None).items()
            if name in kept or ".lora_" in name
        }

        def save(folder: Path) -> None:
            self.language.save(whole, folder)
            if config.policy.lora is not None:
                save_adapter(policy, whole, config, folder / "adapter")

        return save


def save_adapter(policy: PreTrainedModel, whole: dict[str, Tensor], config: RlhfConfig, folder: Path) -> None:
    """The adapter alone, as `peft.PeftModel.from_pretrained` reads it."""
    lora = config.policy.lora
    assert lora is not None
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {
        f"base_model.model.{name.replace('.default.', '.')}": value.contiguous()
        for name, value in whole.items()
        if ".lora_" in name
    }
    leaves = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in whole if ".lora_" in name})
    # a picture tower may have layers of the same names: peft takes a text as a pattern of whole names
    targets = leaves if speaker(policy) is policy else rf"language\..*\.({'|'.join(leaves)})"
    described = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "base_model_name_or_path": config.policy.source,
    }
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def make_learner(config: RlhfConfig, context: Context) -> PpoLearner:
    """Everything fresh: every rank makes the same from the seed."""
    torch.manual_seed(config.run.seed)
    model, language = build_actor_critic(config)
    groups = learning_groups(model, config)
    rows = config.ppo.mini_batch_size // context.world_size
    micro_batch = config.ppo.micro_batch_size or rows
    engine = make_engine(model, groups, config.optimizer, config.engine, context.device, micro_batch)
    rules = rules_of(config, encoder_decoder=bool(model.policy.config.is_encoder_decoder))
    model.temperature = config.rollout.temperature + rules.loss.temperature_offset
    return PpoLearner(
        config,
        model,
        language,
        groups,
        engine,
        rules,
        rules.kl,
        RewardBank(config.rewards),
        Crew.of(config, context, language),
    )
