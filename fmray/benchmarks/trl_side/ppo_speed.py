"""trl 0.11.4's PPO iteration as a process that answers questions, run by the peer environment's Python.

Nothing of fmray is imported but the reward rule and the loop that answers. An iteration is what trl's own examples do:
`generate`, decode, score, `step`; generation gets the whole batch at once, which is faster than trl's default of four prompts.
"""

from __future__ import annotations

import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rule import vowel_share  # type: ignore[import-not-found]  # beside this file
from transformers import AutoTokenizer
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer

sys.path.append(str(Path(__file__).parent.parent / "open_clip_side"))
from answering import answer_questions


class Side:
    """What the questions are put to."""

    def prepare(
        self, folder: str, batch: int, mini_batch: int, epochs: int, new_tokens: int, threads: int
    ) -> dict[str, str]:
        """The trainer with the model in `folder`; versions."""
        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model, reference = (
            AutoModelForSeq2SeqLMWithValueHead.from_pretrained(folder, summary_dropout_prob=0.0)
            for _ in range(2)
        )
        assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)), "dropout is on"
        config = PPOConfig(
            batch_size=batch, mini_batch_size=mini_batch, ppo_epochs=epochs, learning_rate=1.41e-5, seed=0
        )
        self.trainer = PPOTrainer(config, model, reference, self.tokenizer)
        self.sampling = {
            **{"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "max_new_tokens": new_tokens},
            **{"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": self.tokenizer.eos_token_id},
        }
        return {name: metadata.version(name) for name in ("trl", "transformers", "torch")}

    def tokenized(self, texts: list[str]) -> list[list[int]]:
        """The texts' token ids by the peer's own tokenizer."""
        return [list(ids) for ids in self.tokenizer(texts)["input_ids"]]

    def generate(self, prompts: list[list[int]], **changes: Any) -> list[torch.Tensor]:
        """Answers, each begun by the decoder's start token, up to EOS or the limit."""
        queries = [torch.tensor(ids) for ids in prompts]
        return list(
            self.trainer.generate(
                queries, batch_size=len(queries), return_prompt=False, **self.sampling | changes
            )
        )

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        """The likeliest answers' ids, EOS included."""
        with torch.no_grad():
            return [answer[1:].tolist() for answer in self.generate(prompts, do_sample=False)]

    def iteration(self, prompts: list[list[int]]) -> dict[str, float]:
        """Act, judge, credit, learn; seconds of the whole and of generation, and response tokens."""
        started = time.perf_counter()
        answers = self.generate(prompts)
        generated = time.perf_counter()
        # trl 0.11 leaves the first token out of everything and fails where that was the only one
        answers = [torch.cat([answer, answer[-1:]]) if len(answer) < 3 else answer for answer in answers]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        scores = [torch.tensor(score) for score in vowel_share(texts, texts)]
        self.trainer.step([torch.tensor(ids) for ids in prompts], answers, scores)
        ended = time.perf_counter()
        tokens = sum(len(answer) - 1 for answer in answers)
        return {"seconds": ended - started, "generate": generated - started, "tokens": tokens}


if __name__ == "__main__":
    side = Side()
    names = ("prepare", "tokenized", "greedy", "iteration")
    answer_questions({name: getattr(side, name) for name in names})
