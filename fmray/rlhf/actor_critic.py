"""The policy and its critic as one module: what the learner's engine holds, forwards and steps.

One module and one AdamW with groups for each part: the parts share no parameter (or, with a shared trunk, on purpose), so these
are two optimizers that step together; under ZeRO it is one engine instead of two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fmray.config.rlhf import RlhfConfig
from fmray.errors import ConfigError
from fmray.models.freezing import ParameterGroup
from fmray.models.language import (
    Language,
    add_adapter,
    lock_eyes,
    open_language_model,
    response_logits,
    response_states,
    speaker,
    words_config,
)
from fmray.rlhf.losses import token_entropy, token_logp


class ActorCritic(nn.Module):
    """Log-probabilities and values of given answers; every parameter is read inside `forward`, as ZeRO-3 needs."""

    def __init__(
        self,
        policy: PreTrainedModel,
        critic: PreTrainedModel | None,
        value_head: nn.Linear | None,
        *,
        temperature: float,
        shared_prompts: bool,
        entropy_learns: bool = False,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.value_head = value_head
        self.temperature = temperature
        self._shared_prompts = shared_prompts
        self._entropy_learns = entropy_learns

    def forward(
        self,
        prompt_ids_BP: Tensor,
        prompt_mask_BP: Tensor,
        response_ids_BT: Tensor,
        mask_BT: Tensor,
        value_mask_BT: Tensor,
        pixels_BCHW: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`logp_BT`, with a critic `values_BT`, and `entropy_BT` where it learns or nothing does; float32, 0 outside the masks.

        The value at t is of the state before token t; `value_mask_BT` says where it is asked. The output matrix, the largest of
        a small model, is applied to real tokens alone. pixels_BCHW: uint8, each row's picture.
        """
        asked = (prompt_ids_BP, prompt_mask_BP, response_ids_BT, value_mask_BT)
        seen: dict[str, Any] = {"pixels_BCHW": pixels_BCHW, "shared_prompts": self._shared_prompts}
        states_BTD = response_states(self.policy, *asked, **seen)
        real_BT, valued_BT = mask_BT.bool(), value_mask_BT.bool()
        logits_1NV = response_logits(self.policy, states_BTD[real_BT]).unsqueeze(0)
        ids_1N = response_ids_BT[real_BT].unsqueeze(0)
        outputs = {"logp_BT": _spread(token_logp(logits_1NV, ids_1N, self.temperature)[0], real_BT)}
        if (
            self._entropy_learns or not torch.is_grad_enabled()
        ):  # where it neither learns nor is reported, it idles
            outputs["entropy_BT"] = _spread(token_entropy(logits_1NV, self.temperature)[0], real_BT)
        if self.value_head is not None:
            if self.critic is not None:
                states_BTD = response_states(self.critic, *asked, **seen)
            with torch.autocast(states_BTD.device.type, enabled=False):
                values_N = self.value_head(states_BTD[valued_BT].float()).squeeze(-1)
            outputs["values_BT"] = _spread(values_N, valued_BT)
        return outputs


def _spread(values_N: Tensor, real_BT: Tensor) -> Tensor:
    """Values of the real tokens at their places, 0 elsewhere."""
    return torch.zeros_like(real_BT, dtype=values_N.dtype).masked_scatter(real_BT, values_N)


def build_actor_critic(config: RlhfConfig) -> tuple[ActorCritic, Language]:
    """The policy from its source, with its adapter; the critic from its own, with a head that starts at zero."""
    language = open_language_model(config.policy.source, "policy.source")
    policy = prepare_policy(language.model, config)
    critic, head = None, None
    if config.ppo.advantage == "gae":
        width = words_config(policy).hidden_size
        if config.critic.kind == "separate":
            source = config.critic.source or config.policy.source
            critic = open_language_model(source, "critic.source").model
            theirs, ours = words_config(critic).vocab_size, words_config(policy).vocab_size
            if theirs != ours:
                sizes = f"has {theirs} tokens, the policy {ours}"
                cure = f"{sizes}: take one of the same tokenizer"
                raise ConfigError("critic.source", source, cure)
            critic.requires_grad_(True)
            lock_eyes(critic)
            # it reads states, not words: an output matrix that is not tied to the embeddings would only idle
            output = critic.get_output_embeddings()
            if output.weight is not critic.get_input_embeddings().weight:
                output.requires_grad_(False)
            width = words_config(critic).hidden_size
        head = nn.Linear(width, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    module = ActorCritic(
        policy,
        critic,
        head,
        temperature=config.rollout.temperature,
        shared_prompts=config.rollout.samples_per_prompt > 1,
        entropy_learns=config.ppo.entropy_coefficient > 0,
    )
    return module, language


def prepare_policy(policy: PreTrainedModel, config: RlhfConfig) -> PreTrainedModel:
    """What of the policy learns: the same in the learners and in the rollout pool, whose weights come from there.

    A multimodal LLM's picture tower never does; its projector does, unless the language model has an adapter, which then learns
    alone: with the adapter off the policy is its own reference.
    """
    lock_eyes(policy)
    if config.policy.lora is not None:
        torch.manual_seed(config.run.seed)  # the adapter's start is the same everywhere
        policy.requires_grad_(False)
        add_adapter(speaker(policy), config.policy.lora, "policy.lora")
    elif config.policy.freeze_embeddings:
        policy.get_input_embeddings().requires_grad_(False)
        policy.get_output_embeddings().requires_grad_(False)
    return policy


def learning_groups(module: ActorCritic, config: RlhfConfig) -> list[ParameterGroup]:
    """Parameters that learn, by part and by whether they decay (matrices do, biases and norms do not)."""
    optimizer = config.optimizer
    groups: dict[tuple[str, float], ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.split(".", 1)[0]
        rate = optimizer.lr if part == "policy" else config.critic.lr or optimizer.lr
        decay = optimizer.weight_decay if parameter.dim() >= 2 else 0.0
        group = groups.setdefault((part, decay), ParameterGroup(part, [], rate, decay))
        group.parameters.append(parameter)
    return list(groups.values())
