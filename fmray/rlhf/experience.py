"""Act and judge: one rank's part of an iteration's samples, asked of the pools, and everybody's numbers together.

The iteration's prompts are cut into requests by length, the same way for any number of ranks; rank r asks for its share of them.
What comes back is shared between the ranks (token ids and scores are kilobytes), so that crediting it needs no communication.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fmray.config.rlhf import RlhfConfig
from fmray.data.prompts import Prompt, PromptOrder, open_prompts
from fmray.models.language import Language
from fmray.rlhf.prompt_reader import PromptReader, together
from fmray.rlhf.records import RolloutRequest, Rollouts, Scores, pad_right
from fmray.rlhf.roles import REFERENCE, ROLLOUT, ReferencePolicy, RolloutPolicy, reward_pool
from fmray.rlhf.scoring import RewardRole
from fmray.runtime.context import Context
from fmray.runtime.pool import Answer, Ready


@dataclass(frozen=True, slots=True)
class Judged:
    """A batch of samples and what the judges said, on every rank alike, in the order of sample ids."""

    rollouts: Rollouts
    reference_logp_BT: Tensor | None
    """float32 [B, T]; None where the learner is its own reference (adapter_off)."""
    raw: dict[str, Tensor]
    """Each reward's raw scores, float32 [B], NaN where it failed."""
    failures: dict[str, tuple[str, ...]]
    """Lines about this rank's failed samples."""


@dataclass(slots=True)
class _Asked:
    """A request on its way: its number in the iteration, and the judges' answers that will follow the rollouts'."""

    number: int
    rollouts: Rollouts
    reference: Answer[Tensor] | None
    scores: dict[str, Answer[Scores]]


@dataclass(slots=True)
class Crew:
    """A rank's view of the pools: whom it asks for samples and for judgements."""

    config: RlhfConfig
    context: Context
    prompts: tuple[Prompt, ...]
    test_prompts: tuple[Prompt, ...]
    _order: PromptOrder
    _reader: PromptReader
    _in_flight: dict[int, list[tuple[int, Answer[Rollouts]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RlhfConfig, context: Context, language: Language) -> Crew:
        prompts = open_prompts(config.prompts, "train")
        held_out = config.train.evaluate_prompts
        test = open_prompts(config.prompts, "test")[:held_out] if held_out else ()
        order, reader = PromptOrder(len(prompts), config.run.seed), PromptReader(config.prompts, language)
        return cls(config, context, prompts, test, order, reader)

    # ------------------------------------------------------------------------------------------------------------- act

    def ask_ahead(self, iteration: int, version: int, last: int) -> None:
        """Ask for the samples of this iteration and, as far as staleness allows, of the ones that follow, with these weights."""
        for ahead in range(iteration, min(iteration + self.config.rollout.max_staleness, last) + 1):
            if ahead not in self._in_flight:
                requests = self.requests(ahead, version)
                self._in_flight[ahead] = [(number, self._submit(request)) for number, request in requests]

    def requests(self, iteration: int, version: int) -> list[tuple[int, RolloutRequest]]:
        """This rank's requests of an iteration, with their numbers: a function of (seed, iteration, rank, ranks)."""
        rollout = self.config.rollout
        count = rollout.batch_size // rollout.samples_per_prompt
        chosen = [self.prompts[i] for i in self._order.indices(iteration * count, (iteration + 1) * count)]
        per_request = rollout.request_size // rollout.samples_per_prompt
        first_id = iteration * rollout.batch_size
        return self._cut(chosen, per_request, first_id, version, self.config.run.seed)

    def _cut(
        self, prompts: Sequence[Prompt], per_request: int, first_id: int, version: int, seed: int
    ) -> list[tuple[int, RolloutRequest]]:
        """Requests of so many prompts each, sorted by length; this rank's share of them."""
        each = self.config.rollout.samples_per_prompt
        ids = [self._reader.ids(prompt) for prompt in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: (len(ids[i]), i))
        mine = []
        for number, start in enumerate(range(0, len(prompts), per_request)):
            if number % self.context.world_size != self.context.rank:
                continue
            rows = [(i, n) for i in by_length[start : start + per_request] for n in range(each)]
            asked = [prompts[i] for i, _ in rows]
            request = RolloutRequest(
                version=version,
                seed=seed,
                sample_ids=tuple(first_id + i * each + n for i, n in rows),
                prompts=tuple(first_id + i * each for i, _ in rows),
                prompt_ids=tuple(ids[i] for i, _ in rows),
                texts=tuple(prompt.text for prompt in asked),
                pixels_BCHW=self._reader.pixels(asked),
                pictures=together(prompt.picture for prompt in asked),
                answers=together(prompt.answers for prompt in asked),
            )
            mine.append((number, request))
        return mine

    def _submit(self, request: RolloutRequest) -> Answer[Rollouts]:
        return self.context.pools[ROLLOUT].submit(RolloutPolicy.generate, request, phase="act")

    def act(self, iteration: int) -> list[_Asked]:
        """Wait for the iteration's samples; each part goes on to the judges, all at once, as soon as it is there."""
        return [self._ask_judges(number, answer) for number, answer in self._in_flight.pop(iteration)]

    def _ask_judges(self, number: int, answer: Answer[Rollouts]) -> _Asked:
        rollouts = answer.result()
        pools = self.context.pools
        shared = pools.share(rollouts)
        reference = None
        if self.config.reference.kind == "pool":
            reference = pools[REFERENCE].submit(ReferencePolicy.logp, shared, phase="judge")
        scores = {
            name: pools[reward_pool(name)].submit(RewardRole.score, shared, phase="judge")
            for name in self.config.rewards
        }
        return _Asked(number, rollouts, reference, scores)

    # ----------------------------------------------------------------------------------------------------------- judge

    def judge(self, asked: Sequence[_Asked]) -> Judged:
        """Wait for the judges, then bring all ranks' parts together; a collective."""
        mine = Rollouts.together([part.rollouts for part in asked])
        length = mine.response_ids_BT.shape[1]
        reference = None
        if self.config.reference.kind == "pool":
            reference = torch.cat(
                [pad_right(part.reference.result(), length) for part in asked if part.reference is not None]
            )
        said = {name: [part.scores[name].result() for part in asked] for name in self.config.rewards}
        raw = {name: torch.cat([score.raw_B for score in scores]) for name, scores in said.items()}
        failures = {
            name: tuple(line for score in scores for line in score.failures) for name, scores in said.items()
        }
        return self._together(Judged(mine, reference, raw, failures))

    def _together(self, mine: Judged) -> Judged:
        """All ranks' samples in the order of their ids."""
        rollouts = everyones_rollouts(mine.rollouts, self.context)
        order_B = rollouts.sample_id_B.argsort()
        length = rollouts.response_ids_BT.shape[1]
        reference = mine.reference_logp_BT
        if reference is not None:
            reference = self._gather(pad_right(reference, length))[order_B]
        raw = {name: self._gather(scores)[order_B] for name, scores in mine.raw.items()}
        return Judged(rollouts.rows(order_B), reference, raw, mine.failures)

    def _gather(self, rows: Tensor) -> Tensor:
        return self.context.gather(rows.to(self.context.device)).cpu()

    # -------------------------------------------------------------------------------------------------------- evaluate

    def on_test_prompts(self, version: int) -> Judged:
        """Fixed held-out prompts, answered and judged: the same samples' noise at every evaluation."""
        prompts = self.test_prompts
        ranks, rollout = self.context.world_size, self.config.rollout
        # requests of one size, the same number for every rank; what does not fill the last ones is left out
        per_request = min(rollout.request_size // rollout.samples_per_prompt, len(prompts) // ranks)
        prompts = prompts[: len(prompts) // (per_request * ranks) * per_request * ranks]
        # a seed of their own: no training sample shares their noise
        requests = self._cut(prompts, per_request, 0, version, self.config.run.seed + 1_000_003)
        answers = [(number, self._submit(request)) for number, request in requests]
        return self.judge([self._ask_judges(number, answer) for number, answer in answers])

    # ------------------------------------------------------------------------------------------------------- in flight

    def remembered(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The samples in flight, waited for: what is text, and what are tensors."""
        texts: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for iteration, parts in sorted(self._in_flight.items()):
            for number, answer in parts:
                rollouts = answer.result()
                place = {"iteration": iteration, "number": number}
                texts.append(place | rollouts.texts())
                tensors |= {
                    f"{iteration}|{number}|{name}": value.contiguous()
                    for name, value in rollouts.tensors().items()
                }
        return texts, tensors

    def recall(self, texts: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Take up this rank's share of what all ranks remembered, as answers that are already there."""
        self._in_flight.clear()
        for row in texts:
            iteration, number = row["iteration"], row["number"]
            if number % self.context.world_size != self.context.rank:
                continue
            stem = f"{iteration}|{number}|"
            parts = {
                name.removeprefix(stem): value for name, value in tensors.items() if name.startswith(stem)
            }
            rollouts = Rollouts.of(parts, row)
            self._in_flight.setdefault(iteration, []).append((number, Ready(rollouts)))


def everyones_rollouts(mine: Rollouts, context: Context) -> Rollouts:
    """All ranks' samples, padded to the longest anywhere; a collective."""
    if context.world_size == 1:
        return mine
    shape = torch.tensor([[mine.prompt_ids_BP.shape[1], mine.response_ids_BT.shape[1]]])
    prompt, response = context.gather(shape.to(context.device)).amax(dim=0).tolist()
    padded = mine.padded_to(int(prompt), int(response))
    gathered = {
        name: context.gather(value.to(context.device)).cpu() for name, value in padded.tensors().items()
    }
    told = [json.loads(texts) for texts in context.gather_texts(json.dumps(mine.texts()))]
    return Rollouts.of(gathered, {name: [text for texts in told for text in texts[name]] for name in told[0]})
