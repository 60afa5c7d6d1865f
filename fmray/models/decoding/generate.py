"""Answers to prompts: one token per row and step, noise by (seed, sample id, position), finished rows leave the batch.

N prompts  B samples  R rows still in the batch  P prompt tokens  T answer tokens  V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fmray.errors import ConfigError, DataError
from fmray.models.decoding.any import AnyCausalDecoder, AnySeq2SeqDecoder, CrossAttentionDecoder
from fmray.models.decoding.gpt2 import Gpt2Decoder
from fmray.models.decoding.llama import LlamaDecoder
from fmray.models.decoding.sampling import most_likely_tokens, sample_tokens, uniforms
from fmray.models.decoding.t5 import T5Decoder
from fmray.models.decoding.weights import DTYPES, Precision, base_model

LEAVE_AT_SHARE = 8
"""Finished rows leave once they are one in this many: copying the caches costs about half a step."""


class Decoder(Protocol):
    """A policy that answers token by token, one batch of answers at a time.

    It may hold copies of the module's weights: whoever changes the module must call `refresh` before the next `start`.
    """

    @property
    def device(self) -> torch.device:
        """Where the tokens must be."""
        ...

    def refresh(self) -> None:
        """Read the module's weights again, active LoRA adapters added."""
        ...

    def start(
        self,
        ids_NP: Tensor,
        mask_NP: Tensor,
        prompt_of_B: Tensor,
        max_new_tokens: int,
        words_NPD: Tensor | None = None,
    ) -> Tensor:
        """Read each prompt once and begin row b as an answer to prompt `prompt_of_B[b]`; logits of the first token.

        Takes padding on either side; room is made for max_new_tokens. words_NPD: embeddings to read in place of the ids'
        (pictures among words; decoder-only models). float32 [B, V].
        """
        ...

    def step(self, ids_R: Tensor) -> Tensor:
        """Append one token to every row; logits of the next, float32 [R, V]."""
        ...

    def keep(self, rows_K: Tensor) -> None:
        """Keep these rows, in this order (indices into the present ones); none of them frees the memory."""
        ...


def make_decoder(model: Any, precision: Precision = "fp32") -> Decoder:
    """The hand-written step of the model's architecture where there is one, else its own forward and cache.

    model: a transformers model with a language head, or one in a peft wrapper; T5, GPT-2, Llama and Qwen2 have steps
    of their own, and a multimodal LLM its language model's. precision: "bf16" multiplies in bfloat16 and keeps sums, norms and
    softmax in float32. The decoder copies the weights: call its `refresh` after every change. Raises ConfigError for
    another precision and for adapters that cannot be added to the weights.
    """
    if precision not in DTYPES:
        raise ConfigError("precision", precision, f"must be one of {', '.join(DTYPES)}")
    whole = model = base_model(model)
    replaced = None
    if model.config.model_type == "fmray_mllm":
        if model.cross_attention is not None:
            return CrossAttentionDecoder(model, precision)
        if model.output is not None:
            replaced = model.output.ids[0], model.output.decision
        model = base_model(model.language)  # what it says; its pictures come among the prompt's words
    kind = model.config.model_type
    if kind == "t5":
        return T5Decoder(model, precision)
    if kind == "gpt2":
        return Gpt2Decoder(model, precision, replaced)
    if kind == "llama" or (kind == "qwen2" and set(model.config.layer_types) == {"full_attention"}):
        return LlamaDecoder(model, precision, replaced)
    return (
        AnySeq2SeqDecoder(model, precision)
        if model.config.is_encoder_decoder
        else AnyCausalDecoder(model if replaced is None else whole, precision)
    )


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. `Sampling(max_new_tokens=24, eos_id=1, pad_id=0, seed=7)`

    Raises ConfigError where a value is out of its range.
    """

    max_new_tokens: int
    """At least 1."""
    eos_id: int
    """The token that ends an answer; it belongs to the answer."""
    pad_id: int
    """What stands right of an answer."""
    temperature: float = 1.0
    """Above 0; logits are divided by it, for choosing and for log-probabilities alike."""
    greedy: bool = False
    """The likeliest token instead of a drawn one."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", self.max_new_tokens, "must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                "temperature", self.temperature, "must be above 0; greedy=True for the likeliest token"
            )


@dataclass(frozen=True, slots=True)
class Generated:
    """Answers, T as long as the longest.

    `Generated(ids_BT=[[9, 4, 1], [7, 1, 0]], mask_BT=[[1, 1, 1], [1, 1, 0]], logp_BT=…, ended_B=[True, True])`
    """

    ids_BT: Tensor
    """int64 [B, T], right-padded with pad_id."""
    mask_BT: Tensor
    """int64 [B, T], 1 at the answer's tokens, EOS among them; by length, so that a drawn pad_id counts."""
    logp_BT: Tensor
    """float32 [B, T], log-probability of each token under the tempered distribution it was drawn from; 0 at padding."""
    ended_B: Tensor
    """bool [B], EOS came."""


def generate(
    decoder: Decoder,
    prompt_ids_NP: Tensor,
    prompt_mask_NP: Tensor,
    sample_ids_B: Tensor,
    prompt_of_B: Tensor,
    sampling: Sampling,
    words_NPD: Tensor | None = None,
) -> Generated:
    """Answer prompt `prompt_of_B[b]` for each b, with the noise of sample `sample_ids_B[b]`.

    prompt_ids_NP, prompt_mask_NP: int64 [N, P], padded on either side, the mask alone says what is real. sample_ids_B,
    prompt_of_B: int64 [B]. words_NPD: float [N, P, D], the prompts' embeddings where they are more than words. A sample's
    tokens depend on the weights, its prompt, the seed and its id; not on the other rows, their order or the padding (up to a
    product's rounding). Raises DataError where a prompt is empty, indices do not fit, or the logits are not finite.
    """
    _check(prompt_ids_NP, sample_ids_B, prompt_of_B)
    with torch.inference_mode():
        logits_BV = decoder.start(
            prompt_ids_NP.to(decoder.device),
            prompt_mask_NP.to(decoder.device),
            prompt_of_B.to(decoder.device),
            sampling.max_new_tokens,
            None if words_NPD is None else words_NPD.to(decoder.device),
        )
        ids_BT, logp_BT, length_B = _answer(decoder, logits_BV, sample_ids_B.to(decoder.device), sampling)
    return _collected(ids_BT, logp_BT, length_B, sample_ids_B, sampling)


def _answer(
    decoder: Decoder, logits_RV: Tensor, sample_ids_B: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    rows, steps, device = len(sample_ids_B), sampling.max_new_tokens, decoder.device
    noise_BT = uniforms(sampling.seed, sample_ids_B[:, None], torch.arange(steps, device=device))
    ids_BT = torch.full((rows, steps), sampling.pad_id, device=device)
    logp_BT = torch.zeros((rows, steps), device=device)
    length_B = torch.zeros(rows, dtype=torch.int64, device=device)
    rows_R = torch.arange(rows, device=device)
    going_R = torch.ones(rows, dtype=torch.bool, device=device)
    for step in range(steps):
        if sampling.greedy:
            ids_R, logp_R = most_likely_tokens(logits_RV, sampling.temperature)
        else:
            ids_R, logp_R = sample_tokens(logits_RV, noise_BT[rows_R, step], sampling.temperature)
        ids_BT[rows_R, step] = torch.where(going_R, ids_R, sampling.pad_id)
        logp_BT[rows_R, step] = torch.where(going_R, logp_R, 0.0)
        length_B[rows_R] += going_R
        going_R &= ids_R != sampling.eos_id
        going = int(going_R.sum())
        if going == 0 or step + 1 == steps:
            break
        if (len(rows_R) - going) * LEAVE_AT_SHARE >= len(rows_R):
            stay_K = going_R.nonzero().squeeze(1)
            decoder.keep(stay_K)
            rows_R, ids_R, going_R = rows_R[stay_K], ids_R[stay_K], going_R[stay_K]
        logits_RV = decoder.step(ids_R)
    decoder.keep(rows_R[:0])
    return ids_BT, logp_BT, length_B


def _collected(
    ids_BT: Tensor, logp_BT: Tensor, length_B: Tensor, sample_ids_B: Tensor, sampling: Sampling
) -> Generated:
    longest = int(length_B.max())
    # copies made outside of inference mode: a loss may save them for its gradient
    ids_BT, logp_BT, length_B = ids_BT[:, :longest].clone(), logp_BT[:, :longest].clone(), length_B.clone()
    broken_BT = ~torch.isfinite(logp_BT)
    if bool(broken_BT.any()):
        row, position = (int(i) for i in broken_BT.nonzero()[0])
        raise DataError(
            f"sample {int(sample_ids_B[row])}: logits at position {position} are not finite; the policy's weights are broken"
        )
    mask_BT = torch.arange(longest, device=ids_BT.device) < length_B[:, None]
    last_B = ids_BT.gather(1, length_B[:, None] - 1).squeeze(1)
    return Generated(ids_BT, mask_BT.long(), logp_BT, last_B == sampling.eos_id)


def _check(prompt_ids_NP: Tensor, sample_ids_B: Tensor, prompt_of_B: Tensor) -> None:
    if sample_ids_B.dim() != 1 or sample_ids_B.shape != prompt_of_B.shape or not len(sample_ids_B):
        shapes = f"{tuple(sample_ids_B.shape)} and {tuple(prompt_of_B.shape)}"
        raise DataError(f"sample_ids_B and prompt_of_B must be the same [B] with B at least 1, not {shapes}")
    low, high = int(prompt_of_B.min()), int(prompt_of_B.max())
    if low < 0 or high >= len(prompt_ids_NP):
        raise DataError(
            f"prompt_of_B reaches from {low} to {high}, but there are {len(prompt_ids_NP)} prompts"
        )
