"""fmray's side of `fmray benchmark ppo` beside its runs (`ppo_held`): prompts, answers, decoding, the bare model calls.

A process that answers questions, run as `python -m fmray.benchmarks.ppo_side`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fmray.benchmarks.decoding import measure_decoding
from fmray.benchmarks.open_clip_side.answering import answer_questions
from fmray.benchmarks.ppo_bare import Bare
from fmray.benchmarks.ppo_bench import Precision
from fmray.config.rlhf import RlhfConfig
from fmray.models.decoding.generate import Sampling, generate, make_decoder
from fmray.models.language import open_language_model
from fmray.rlhf.roles import left_padded
from fmray.runtime.context import prepare_process

NO_TOKEN = -1


class PpoSide:
    """What the questions are put to."""

    config: RlhfConfig
    _bare: Bare | None = None

    def prepare(self, config: str) -> None:
        """Read a configuration's file."""
        self.config = RlhfConfig.model_validate_json(Path(config).read_text(encoding="utf-8"))
        prepare_process(self.config.runtime)

    @property
    def bare(self) -> Bare:
        if self._bare is None:
            self._bare = Bare(self.config)
        return self._bare

    def prompts(self, iteration: int) -> dict[str, Any]:
        """What the loop asks in that iteration: texts and token ids."""
        requests = self.bare.requests(iteration)
        texts = [text for request in requests for text in request.texts]
        return {"texts": texts, "ids": [list(ids) for request in requests for ids in request.prompt_ids]}

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        """The likeliest answers' ids, EOS included, with the starting weights in fp32."""
        language = open_language_model(self.config.policy.source, "policy.source")
        rows_B = torch.arange(len(prompts))
        limit = self.config.rollout.max_new_tokens
        sampling = Sampling(limit, language.eos_id, language.eos_id, greedy=True)
        ids_BP, mask_BP = left_padded([tuple(ids) for ids in prompts])
        made = generate(make_decoder(language.model), ids_BP, mask_BP, rows_B, rows_B, sampling)
        return [ids[mask.bool()].tolist() for ids, mask in zip(made.ids_BT, made.mask_BT, strict=True)]

    def decode(self, source: str, precision: Precision, ends: bool, rounds: int) -> dict[str, Any]:
        """`DecodingSpeed` of a policy on the first iteration's prompts; `ends=False`: no token is EOS."""
        language = open_language_model(source, "source")
        texts = self.prompts(0)["texts"]
        ids_BP, mask_BP = left_padded([tuple(language.tokenizer(text)["input_ids"]) for text in texts])
        eos = language.eos_id
        sampling = Sampling(self.config.rollout.max_new_tokens, eos if ends else NO_TOKEN, eos)
        speed = measure_decoding(
            language.model, ids_BP, mask_BP, sampling, precision=precision, rounds=rounds
        )
        return asdict(speed)

    def bare_calls(self, iteration: int) -> dict[str, float]:
        """That iteration's model calls alone: seconds, and the response tokens that they were about."""
        calls = self.bare.calls(iteration)
        return {"seconds": self.bare.seconds(calls), "tokens": calls.tokens}


def main() -> None:
    """Answer until standard input ends."""
    side = PpoSide()
    names = ("prepare", "prompts", "greedy", "decode", "bare_calls")
    answer_questions({name: getattr(side, name) for name in names})


if __name__ == "__main__":
    main()
