"""The output side of a multimodal LLM: routing tokens that decide for a picture, and what the picture should show.

GILL's scheme (Koh et al. 2023, "Generating Images with Multimodal Language Models", §3): tokens [IMG1]…[IMGk] with embeddings of
their own, of which the model learns to say the first; a mapper from the states there to the generator's space, learned by
regression to the embedding of the caption and by contrast with pictures. The space here is a dual encoder's (`generator.py`).
The decision has an output row of its own too: beside an adapter the output matrix is frozen, and no state points to the row of a
token that nobody ever said.

K pictures that answer  k routing tokens  F width of the words  D width of the generator's space  R rows  L columns
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmray.config.answers import OutputConfig
from fmray.errors import ConfigError

ROUTING_TOKEN = "<|picture|>"
"""What the decision is called where the tokenizer has no token to spare."""


class OutputSide(nn.Module):
    """Routing tokens as the language model reads them, the decision as it says it, and the projector from its states there.

    ZeRO-3: used by calls alone.
    """

    def __init__(self, width: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.count, self.layers = int(config["tokens"]), tuple(config["layers"])
        self.weight, self.temperature = float(config["weight"]), float(config["temperature"])
        self.ids = tuple(config["routing_ids"])
        states = width * len(self.layers)
        self.tokens, self.decision = nn.Embedding(self.count, width), nn.Linear(width, 1)
        nn.init.zeros_(self.decision.weight)
        nn.init.zeros_(self.decision.bias)
        self.norm, self.score = nn.LayerNorm(states), nn.Linear(states, 1)
        self.up, self.down = nn.Linear(states, config["hidden"]), nn.Linear(config["hidden"], config["width"])
        self.dropout = nn.Dropout(config["dropout"])

    def forward(self, states_KkF: Tensor) -> Tensor:
        """States at the routing tokens, pooled by learned attention, to unit vectors, float32 [K, D]."""
        states_KkF = self.norm(states_KkF.float())
        share_Kk1 = self.score(states_KkF).softmax(dim=1)
        pooled_KF = (share_Kk1 * states_KkF).sum(dim=1)
        return F.normalize(self.down(self.dropout(F.gelu(self.up(pooled_KF)))).float(), dim=-1)

    def places(self, ids_RL: Tensor) -> Tensor:
        """Which routing token stands where, int64 [R, L], 0..k-1; -1: none."""
        place_RL = torch.full_like(ids_RL, -1)
        for place, token in enumerate(self.ids):
            place_RL = place_RL.masked_fill(ids_RL == token, place)
        return place_RL

    def put(self, words_RLF: Tensor, ids_RL: Tensor) -> Tensor:
        """Words with the routing tokens' own embeddings in their places."""
        place_RL = self.places(ids_RL)
        own_RLF = self.tokens(place_RL.clamp(min=0)).to(words_RLF.dtype)
        return torch.where(place_RL.unsqueeze(-1) >= 0, own_RLF, words_RLF)

    def decided(self, logits_NV: Tensor, states_NF: Tensor) -> Tensor:
        """The vocabulary's logits with the decision's own in its column; states: the last layer's, [..., F]."""
        column = torch.tensor([self.ids[0]], device=logits_NV.device)
        # a copy: what a module handed on belongs to its hooks too (ZeRO-3's)
        return logits_NV.index_copy(-1, column, self.decision(states_NF).to(logits_NV.dtype))

    @property
    def deep(self) -> bool:
        """Whether it reads more than the last layer's states."""
        return self.layers != (-1,)

    def states(self, body: Any) -> Tensor:
        """What it reads of the language model's output, [R, L, F·layers]."""
        if not self.deep:
            last: Tensor = body.last_hidden_state
            return last
        return torch.cat([body.hidden_states[layer] for layer in self.layers], dim=-1)

    def read(self, states_RLF: Tensor, ids_RL: Tensor) -> Tensor:
        """What each picture that answers should show, in reading order, float32 [K, D]."""
        rows_K, columns_K = (ids_RL == self.ids[0]).nonzero(as_tuple=True)
        columns_Kk = columns_K[:, None] + torch.arange(self.count, device=ids_RL.device)
        embeds_KD: Tensor = self(states_RLF[rows_K[:, None], columns_Kk])
        return embeds_KD

    def loss(self, states_RLF: Tensor, ids_RL: Tensor, targets_K2D: Tensor) -> Tensor:
        """`weight` times `reply_loss` of the rows' pictures, targets in reading order; with none it is 0, with gradients of 0."""
        embeds_KD = self.read(states_RLF, ids_RL)
        return self.weight * reply_loss(embeds_KD, targets_K2D, self.temperature)


def reply_loss(embeds_KD: Tensor, targets_K2D: Tensor, temperature: float) -> Tensor:
    """mean(1 − cos(e, text)) + InfoNCE(e, texts) + InfoNCE(e, pictures), scalar; all vectors have norm 1.

    targets_K2D: the caption's embedding, then the picture's, which is zero where nobody has it: such rows are left out of the
    last term. GILL regresses to the text and contrasts with pictures; contrast with texts is ours, so that words without a
    picture are told apart too. 0 where there is no row.
    """
    if not len(embeds_KD):
        return 0.0 * embeds_KD.sum()
    text_KD, picture_KD = targets_K2D.unbind(dim=1)
    loss = (1 - (embeds_KD * text_KD).sum(dim=1)).mean() + contrast(embeds_KD, text_KD, text_KD, temperature)
    known_K = picture_KD.abs().sum(dim=1) > 0
    if bool(known_K.any()):
        loss = loss + contrast(embeds_KD[known_K], picture_KD[known_K], text_KD[known_K], temperature)
    return loss


def contrast(embeds_ND: Tensor, others_ND: Tensor, text_ND: Tensor, temperature: float) -> Tensor:
    """CLIP's symmetric InfoNCE over the rows of the call, scalar; rows with equal texts share the target evenly.

    As `objectives.contrastive.infonce`, but over this rank's micro-batch alone: its rows differ in number from rank to rank.
    """
    logits_NN = embeds_ND @ others_ND.T / temperature
    same_NN = (text_ND[:, None] == text_ND[None, :]).all(dim=-1).float()
    target_NN = same_NN / same_NN.sum(dim=1, keepdim=True)
    both = [-(target_NN * logits.log_softmax(dim=1)).sum(dim=1).mean() for logits in (logits_NN, logits_NN.T)]
    return (both[0] + both[1]) / 2


# ------------------------------------------------------------------------------------------------------------------- building


def output_keys(config: OutputConfig, width: int, routing_ids: tuple[int, ...]) -> dict[str, Any]:
    """What a saved model's configuration holds of its output side; width: D, routing_ids: k token ids."""
    keys = config.model_dump(mode="json")
    return {**keys, "width": width, "routing_ids": list(routing_ids)}


def check_same(saved: dict[str, Any], config: OutputConfig, width: int) -> None:
    """Raises ConfigError where a configuration asks for another projector than the checkpoint's."""
    for name in ("tokens", "layers", "hidden"):
        asked = config.model_dump(mode="json")[name]
        if saved[name] != asked:
            raise ConfigError(
                f"model.output.{name}", asked, f"the checkpoint's output part has {saved[name]}"
            )
    if saved["width"] != width:
        cure = f"embeds in {width} dimensions, the checkpoint's output part in {saved['width']}"
        raise ConfigError("model.output.clip", config.clip, cure)
