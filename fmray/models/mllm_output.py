"""A multimodal LLM given an output side, and what it then says: routing tokens of its tokenizer, states read where they stand.

B dialogues  K pictures that answer  k routing tokens  P prompt tokens  D width of the generator's space
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fmray.config.answers import OutputConfig
from fmray.models.conversation import Renderer
from fmray.models.gated_attention import Memory
from fmray.models.mllm import Mllm
from fmray.models.mllm_lines import left_padded
from fmray.models.output_side import ROUTING_TOKEN, OutputSide, check_same, output_keys
from fmray.models.packing import Line, Packed
from fmray.models.saved import load_any_clip
from fmray.models.towers import locate_model
from fmray.types import Dialogue

Wanted = tuple[str, str]
"""What a picture that answers shows, in words, and its key in the source; the key is empty where nobody has it."""
ReplyTargets = Callable[[Sequence[Wanted]], Tensor]
"""To the embeddings of the words and of the pictures (zeros where nobody has it), float32 [K, 2, D]."""


def add_output(model: Mllm, tokenizer: PreTrainedTokenizerFast, config: OutputConfig) -> None:
    """An output side for a model that has none, in place; of one that has, the loss's weights are set anew.

    The decision is a special token that nobody uses, else one added to the tokenizer. The tokens behind it need no place in the
    vocabulary: they are never chosen. Raises ConfigError where the checkpoint's differs, CheckpointError where `clip` is no dual
    encoder.
    """
    encoder, _ = load_any_clip(locate_model(config.clip, "model.output.clip"))
    width = int(encoder.config.embed_dim)
    saved = model.config.output
    if saved is not None:
        check_same(saved, config, width)
        model.config.output = output_keys(config, width, tuple(saved["routing_ids"]))
        assert model.output is not None
        model.output.weight, model.output.temperature = config.weight, config.temperature
        model.output.dropout.p = config.dropout
        return
    decision = _spare_token(model, tokenizer)
    behind = max(model.config.text_config.vocab_size, model.config.image_token_id + 1)
    ids = (decision, *range(behind, behind + config.tokens - 1))
    model.config.output = output_keys(config, width, ids)
    table: Any = model.get_input_embeddings()
    model.output = OutputSide(table.embedding_dim, model.config.output)
    nn.init.normal_(model.output.tokens.weight, std=float(table.weight.detach().float().std()))


@torch.no_grad()
def _spare_token(model: Mllm, tokenizer: PreTrainedTokenizerFast) -> int:
    """A special token without a use, else a new one: behind the tokenizer's, in rows of the table that are free, or added."""
    config = model.config
    found = Renderer(tokenizer, config.template, 0, config.image_token_id).spare_id()
    if found is not None:
        return found
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [ROUTING_TOKEN]}, replace_extra_special_tokens=False
    )
    token = int(tokenizer.convert_tokens_to_ids(ROUTING_TOKEN))
    table: Any = model.language.get_input_embeddings()
    spread = float(table.weight.float().std())
    if token >= table.num_embeddings:
        model.language.resize_token_embeddings(token + 1, mean_resizing=False)
        config.text_config.vocab_size = token + 1
        config.image_token_id = max(config.image_token_id, token + 1)
    # a row of its own direction: beside an adapter neither table nor output matrix learns
    for rows in (model.language.get_input_embeddings(), model.language.get_output_embeddings()):
        rows.weight[token].normal_(std=spread)
    return token


def picture_turns(packed: Packed, dialogues: Sequence[Dialogue], decision: int) -> list[Wanted]:
    """What each picture that answers shows, in the reading order of the packed rows."""
    wanted: list[Wanted] = []
    seen: dict[int, int] = {}
    rows_K, columns_K = (packed.ids_RL == decision).nonzero(as_tuple=True)
    for owner in packed.owner_RL[rows_K, columns_K].tolist():
        dialogue = dialogues[owner]
        turns = [place for place, turn in enumerate(dialogue.turns) if turn.picture]
        turn = turns[seen.get(owner, 0)]
        seen[owner] = seen.get(owner, 0) + 1
        last = turn == len(dialogue.turns) - 1
        wanted.append((dialogue.turns[turn].picture, dialogue.reply if last else ""))
    return wanted


def shown(
    model: Mllm,
    prompts: Callable[..., tuple[Tensor, Memory | None]],
    lines: Sequence[Line],
    said: Sequence[Sequence[int]],
    projected_NPD: Tensor | None,
) -> list[Tensor | None]:
    """What the picture of each answer that decided for one should show, float32 [D]; None at answers of words.

    One pass over prompts and answers up to the decision, with all routing tokens put behind. `prompts`: ids, mask, lines and
    projected pictures to embeddings and what they look at.
    """
    embeds: list[Tensor | None] = [None] * len(lines)
    if model.output is None:
        return embeds
    decision, *rest = model.output.ids
    drawn = [place for place, ids in enumerate(said) if decision in ids]
    if not drawn:
        return embeds
    whole = []
    for place in drawn:
        words = (*said[place][: said[place].index(decision)], decision, *rest)
        line = lines[place]
        whole.append(replace(line, ids=(*line.ids, *words), learns=(*line.learns, *[False] * len(words))))
    ids_KP, mask_KP = (tensor.to(model.device) for tensor in left_padded(whole))
    words_KPF, memory = prompts(ids_KP, mask_KP, whole, projected_NPD)
    body = model.body(inputs_embeds=words_KPF, attention_mask=mask_KP, memory=memory, deep=model.output.deep)
    embeds_KD = model.output.read(model.output.states(body), ids_KP)
    # earlier turns may have pictures too: the last of a row is the answer
    rows_K = (ids_KP == decision).nonzero(as_tuple=True)[0].tolist()
    for row, embedding_D in zip(rows_K, embeds_KD.cpu(), strict=True):
        embeds[drawn[row]] = embedding_D.clone()
    return embeds
