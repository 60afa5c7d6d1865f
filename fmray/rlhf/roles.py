"""Who is asked: the rollout policy and the reference, each in a pool of its own. (The rewards' roles are in `scorers`.)

A role holds no random state: its answer is a function of the weights that the request names and of the request.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fmray.config.rlhf import RlhfConfig
from fmray.models.decoding.generate import Sampling, generate, make_decoder
from fmray.models.language import embedded_prompts, open_language_model, response_logits, response_states
from fmray.rlhf.actor_critic import prepare_policy
from fmray.rlhf.losses import token_logp
from fmray.rlhf.records import RolloutRequest, Rollouts
from fmray.rlhf.scorers import build_scorer
from fmray.runtime.pool import Place, PoolPlan, RoleSpec
from fmray.runtime.weights import Bucket, take_version

ROLLOUT, REFERENCE = "rollout", "reference"


def reward_pool(name: str) -> str:
    """The name of a reward's pool."""
    return f"reward.{name}"


def pool_plan(config: RlhfConfig) -> PoolPlan:
    """The pools of a run: rollout policy, reference, and one for each reward."""
    roles = [RoleSpec(ROLLOUT, RolloutPolicy, config, config.rollout.pool)]
    if config.reference.kind == "pool":
        roles.append(RoleSpec(REFERENCE, ReferencePolicy, config, config.reference.pool))
    roles += [
        RoleSpec(reward_pool(name), build_scorer, reward, reward.pool)
        for name, reward in config.rewards.items()
    ]
    return PoolPlan(tuple(roles), keep_versions=config.rollout.max_staleness + 1)


class RolloutPolicy:
    """Samples answers with exactly the weights that a request names, loading them when it holds others."""

    def __init__(self, config: RlhfConfig, place: Place) -> None:
        language = open_language_model(config.policy.source, "policy.source")
        self._rollout = config.rollout
        self._weights = place.weights
        self._device = place.device
        self._tokenizer = language.tokenizer
        self._eos = language.eos_id
        self._model = prepare_policy(language.model, config).to(place.device)
        self._parameters = dict(self._model.named_parameters())
        self._decoder = make_decoder(self._model, config.rollout.precision)
        self._version: int | None = None
        if (newest := place.weights.newest()) is not None:
            self.load(newest)  # rebuilt in the middle of a run

    def load(self, version: int) -> int:
        """Take a published version; returns its checksum, computed over what arrived. Raises PoolError where they differ."""
        self._version = None
        published = take_version(self._weights, version, self._copy)
        self._decoder.refresh()
        self._version = version
        return published.checksum

    def _copy(self, bucket: Bucket) -> None:
        for name, tensor in bucket.items():
            self._parameters[name].data.copy_(tensor)

    def generate(self, request: RolloutRequest) -> Rollouts:
        """One answer for each sample of the request."""
        if self._version != request.version:
            self.load(request.version)
        first_of = {prompt: row for row, prompt in reversed(list(enumerate(request.prompts)))}
        first_N = list(first_of.values())
        number_of = {prompt: number for number, prompt in enumerate(first_of)}
        prompt_of_B = torch.tensor([number_of[prompt] for prompt in request.prompts])
        ids_NP, mask_NP = left_padded([request.prompt_ids[row] for row in first_N])
        pixels_NCHW = None if request.pixels_BCHW is None else request.pixels_BCHW[first_N]
        sample_ids_B = torch.tensor(request.sample_ids)
        rollout = self._rollout
        pad = self._tokenizer.pad_token_id
        sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            eos_id=self._eos,
            pad_id=self._eos if pad is None else int(pad),
            temperature=rollout.temperature,
            seed=request.seed,
        )
        device = self._device
        made = generate(
            self._decoder,
            ids_NP.to(device),
            mask_NP.to(device),
            sample_ids_B.to(device),
            prompt_of_B.to(device),
            sampling,
            self._words(ids_NP, pixels_NCHW),
        )
        ids_BT, mask_BT = made.ids_BT.cpu(), made.mask_BT.cpu()
        texts = self._tokenizer.batch_decode(
            [ids[mask.bool()].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)],
            skip_special_tokens=True,
        )
        return Rollouts(
            sample_id_B=sample_ids_B,
            prompt_B=torch.tensor(request.prompts),
            version_B=torch.full_like(sample_ids_B, request.version),
            prompt_ids_BP=ids_NP[prompt_of_B],
            prompt_mask_BP=mask_NP[prompt_of_B],
            response_ids_BT=ids_BT,
            mask_BT=mask_BT.float(),
            rollout_logp_BT=made.logp_BT.cpu(),
            ended_B=made.ended_B.cpu(),
            prompts=request.texts,
            responses=tuple(texts),
            pixels_BCHW=request.pixels_BCHW,
            pictures=request.pictures,
            answers=request.answers,
        )

    def _words(self, ids_NP: Tensor, pixels_NCHW: Tensor | None) -> Tensor | None:
        """The prompts' embeddings with their pictures among them; None where they are ids alone."""
        if pixels_NCHW is None:
            return None
        device = self._device
        with torch.inference_mode(), arithmetic(device, self._rollout.precision):
            return embedded_prompts(self._model, ids_NP.to(device), pixels_NCHW.to(device))


class ReferencePolicy:
    """The frozen model that the policy is held to."""

    def __init__(self, config: RlhfConfig, place: Place) -> None:
        source = config.reference.source or config.policy.source
        self._model = open_language_model(source, "reference.source").model.to(place.device)
        self._device = place.device
        self._precision = config.reference.precision
        self._temperature = config.rollout.temperature
        self._shared_prompts = config.rollout.samples_per_prompt > 1

    def logp(self, rollouts: Rollouts) -> Tensor:
        """Its log-probabilities of the answers' tokens, float32 [B, T], 0 at padding."""
        batch, real_BT = rollouts.on(self._device), rollouts.mask_BT.bool()
        with torch.inference_mode(), arithmetic(self._device, self._precision):
            states_BTD = response_states(
                self._model,
                batch.prompt_ids_BP,
                batch.prompt_mask_BP,
                batch.response_ids_BT,
                batch.mask_BT,
                pixels_BCHW=batch.pixels_BCHW,
                shared_prompts=self._shared_prompts,
            )
            states_ND = states_BTD[batch.mask_BT.bool()]
            logits_1NV = response_logits(self._model, states_ND).unsqueeze(0)
            ids_1N = batch.response_ids_BT[batch.mask_BT.bool()].unsqueeze(0)
            logp_N = token_logp(logits_1NV, ids_1N, self._temperature)[0]
        return torch.zeros(real_BT.shape).masked_scatter(real_BT, logp_N.cpu())


def arithmetic(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Inside, matrices are multiplied in this precision ("fp32" or "bf16")."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def left_padded(rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Token ids [N, P] with zeros to the left, and the mask that tells which are real."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    return ids, mask
