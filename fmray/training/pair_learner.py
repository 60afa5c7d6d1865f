"""What changes while a dual encoder learns from pairs."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from fmray.models.clip import DualEncoder
from fmray.models.freezing import ParameterGroup
from fmray.training.averaging import WeightAverage, whole_weights
from fmray.training.checkpoint import Memory
from fmray.training.engine import Engine


@dataclass(frozen=True, slots=True)
class PairLearner:
    """`Learner` of contrastive pretraining; it remembers nothing beside weights and moments."""

    model: DualEncoder
    tokenizer: PreTrainedTokenizerFast
    groups: list[ParameterGroup]
    engine: Engine
    average: WeightAverage | None

    def exported(self) -> DualEncoder:
        """A plain copy as it would be saved now, on the CPU, free of the engine; a collective."""
        copy = DualEncoder(self.model.config)
        # buffers that are not saved (position ids) are among the weights too
        copy.load_state_dict(whole_weights(self.model, self.engine, self.average), strict=False)
        copy.eval()
        return copy

    def remember(self) -> Memory:
        return Memory()

    def recall(self, memories: list[Memory]) -> None:
        """Nothing to recall."""
