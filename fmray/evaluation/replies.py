"""Requests that a picture or words answer: whether the model decides rightly, and whether its picture is the right one.

B requests  M pictures of the test split  K pictures that should answer  D width of the dual encoder's space
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmray.config.answers import AnswerEvaluateConfig
from fmray.data.dialogue_loader import decoded_pictures
from fmray.data.dialogues import DialogueSource
from fmray.data.verdicts import spread
from fmray.errors import DataError
from fmray.evaluation.answers import check_readable, metric_name, picture_batches, readable_pictures
from fmray.evaluation.embed import embed_texts, measuring
from fmray.evaluation.retrieval import ranks_of_positives, recall_at, slices
from fmray.evaluation.vqa_accuracy import exact_match
from fmray.models.answering import Answering
from fmray.models.generator import NearestPicture
from fmray.models.mllm_answering import MllmAnswering
from fmray.models.saved import LoadedDualEncoder, load_any_clip
from fmray.models.towers import locate_model
from fmray.runtime.context import Context
from fmray.types import Dialogue, Metrics

AT_ONCE = 64
"""Pictures that the dual encoder reads at once."""
SHOWN = 5
"""Pictures that are kept with a request, the nearest first."""


@dataclass(frozen=True, slots=True)
class Replied:
    """A request with what the model answered."""

    dialogue: Dialogue
    said: str
    embedding_D: Tensor | None
    """Where it answered with a picture."""

    @property
    def wants_picture(self) -> bool:
        """Whether a picture answers."""
        return bool(self.dialogue.turns[-1].picture)

    @property
    def routed(self) -> bool:
        """Whether the decision was right."""
        return self.wants_picture == (self.embedding_D is not None)


def load_clip_of(answering: MllmAnswering, device: torch.device) -> LoadedDualEncoder:
    """The dual encoder whose space the model's pictures are wanted in."""
    location = locate_model(answering.model.config.output["clip"], "model.output.clip")
    model, tokenizer = load_any_clip(location)
    return LoadedDualEncoder(model.to(device).eval(), tokenizer, model.image, model.config.max_tokens)


@torch.no_grad()
def embed_keys(encoder: LoadedDualEncoder, source: DialogueSource, keys: Sequence[str]) -> Tensor:
    """A source's pictures by key, float32 [len(keys), D], norm 1; raises DataError where one cannot be read."""
    parts = []
    for part in slices(len(keys), AT_ONCE):
        pixels_NCHW = decoded_pictures(source, keys[part], encoder.image).pixels_NCHW
        assert pixels_NCHW is not None
        parts.append(encoder.model.encode_image(pixels_NCHW.to(encoder.model.device)))
    return torch.cat(parts)


def evaluate_replies(
    answering: MllmAnswering,
    encoder: LoadedDualEncoder,
    source: DialogueSource,
    config: AnswerEvaluateConfig,
    context: Context,
    *,
    max_bad_share: float = 0.01,
) -> tuple[Metrics, dict[str, Any]]:
    """The numbers of a split of requests, the same on every rank, and the rest of `evaluation.json`.

    `eval/routing`: share of right decisions, in all and by kind of request. `eval/replies/<kind>/r1`, `r5`, `r10`,
    `mean_rank`: the right picture among all that answer any request of the split, for each kind of request for pictures; one
    that was answered with words counts as last. Beside it `…/ceiling/…`: the dual encoder's own text instead of the model, and
    `…/chance/…`. `eval/exact_match`: of the requests that words answer. Raises DataError as `evaluate_answers`.
    """
    everything = [source[index] for index in range(len(source))]
    keys = tuple(dict.fromkeys(dialogue.reply for dialogue in everything if dialogue.reply))
    chosen = list(spread(tuple(everything), config.max_samples))
    if not chosen or not keys:
        raise DataError(
            "the test split has no request that a picture answers: there is nothing to evaluate on"
        )
    with measuring(answering.model):
        replied, unreadable = reply_all(answering, source, chosen, config, context)
    check_readable(unreadable, len(chosen), max_bad_share)
    generator = NearestPicture(keys, embed_keys(encoder, source, keys), source.picture, SHOWN)
    captions = {d.reply: d.turns[-1].picture for d in everything if d.reply}
    metrics: Metrics = {"routing": share_routed(replied), **routing_by_kind(replied)}
    words = [each for each in replied if not each.wants_picture]
    if words:
        metrics["exact_match"] = sum(map(_right, words)) / len(words)
    ranks: dict[str, int] = {}
    for kind, some in by_kind([each for each in replied if each.wants_picture]).items():
        found, places = retrieval(some, encoder, generator, captions)
        metrics |= {f"replies/{metric_name(kind)}/{name}": value for name, value in found.items()}
        ranks |= places
    kinds = [kind_row(kind, some) for kind, some in by_kind(replied).items()]
    details = {
        "questions": len(replied),
        "unreadable": len(unreadable),
        "replies": {
            "pictures": len(keys),
            "kinds": kinds,
            "gallery": shown(replied, generator, ranks, captions, config),
        },
    }
    return {f"eval/{name}": value for name, value in metrics.items()}, details


# ---------------------------------------------------------------------------------------------------------- answering


def reply_all(
    answering: Answering,
    source: DialogueSource,
    dialogues: Sequence[Dialogue],
    config: AnswerEvaluateConfig,
    context: Context,
) -> tuple[list[Replied], dict[str, str]]:
    """Every readable request with its answer, in order, and why the other ones cannot be read, by name; on every rank."""
    batches = picture_batches(dialogues, config.batch_size)
    each = -(-len(batches) // context.world_size)
    said: dict[str, tuple[str, list[float] | None]] = {}
    bad: dict[str, str] = {}
    for batch in batches[context.rank * each : (context.rank + 1) * each]:
        pictures, damaged = readable_pictures(source, [dialogues[place] for place in batch], answering.image)
        reasons = {p: [damaged[key] for key in dialogues[p].pictures if key in damaged] for p in batch}
        bad |= {str(place): found[0] for place, found in reasons.items() if found}
        whole = [place for place in batch if not reasons[place]]
        if whole:
            answers = answering.answer([dialogues[place] for place in whole], pictures, beams=config.beams)
            for place, one in zip(whole, answers, strict=True):
                embedding = None if one.embedding_D is None else one.embedding_D.tolist()
                said[str(place)] = one.text, embedding
    everyones = [json.loads(text) for text in context.gather_texts(json.dumps([said, bad]))]
    said_of = {int(place): one for found, _ in everyones for place, one in found.items()}
    reasons_of = {int(place): reason for _, found in everyones for place, reason in found.items()}
    replied = []
    for place, (text, embedding) in sorted(said_of.items()):
        replied.append(
            Replied(dialogues[place], text, None if embedding is None else torch.tensor(embedding))
        )
    return replied, {dialogues[place].name: reasons_of[place] for place in sorted(reasons_of)}


# ---------------------------------------------------------------------------------------------------------- measuring


def by_kind(replied: Sequence[Replied]) -> dict[str, list[Replied]]:
    """Those of each kind of request, kinds by name."""
    kinds: defaultdict[str, list[Replied]] = defaultdict(list)
    for each in replied:
        kinds[each.dialogue.kind].append(each)
    return dict(sorted(kinds.items()))


def share_routed(replied: Sequence[Replied]) -> float:
    """Share of right decisions."""
    return sum(each.routed for each in replied) / len(replied)


def routing_by_kind(replied: Sequence[Replied]) -> Metrics:
    """`routing/<kind>` of each kind of request, where there are several."""
    kinds = by_kind(replied)
    if len(kinds) < 2:
        return {}
    return {f"routing/{metric_name(kind)}": share_routed(some) for kind, some in kinds.items()}


def kind_row(kind: str, replied: Sequence[Replied]) -> dict[str, Any]:
    """How requests of a kind were decided and, of words, how many answers are right."""
    drawn = sum(each.embedding_D is not None for each in replied)
    wants = replied[0].wants_picture
    row = {"kind": kind, "requests": len(replied), "wants": "picture" if wants else "words"}
    right = None if wants else sum(map(_right, replied)) / len(replied)
    return {**row, "pictures": drawn, "words": len(replied) - drawn, "exact_match": right}


def retrieval(
    replied: Sequence[Replied],
    encoder: LoadedDualEncoder,
    generator: NearestPicture,
    captions: dict[str, str],
) -> tuple[Metrics, dict[str, int]]:
    """Recall and mean rank (from 1) of some requests for pictures, the ceiling, chance; the place of each by name, from 0."""
    group = {text: number for number, text in enumerate(dict.fromkeys(captions.values()))}
    gallery_key_M = torch.tensor([group[captions[key]] for key in generator.keys])
    embeds_MD, size = generator.embeds_MD.cpu(), len(generator.keys)
    known = [each for each in replied if each.dialogue.reply]
    wanted = [captions[each.dialogue.reply] for each in known]
    key_N = torch.tensor([group[text] for text in wanted])
    ranks_N = torch.full((len(known),), size - 1)
    drawn = [place for place, each in enumerate(known) if each.embedding_D is not None]
    if drawn:
        own = [known[place].embedding_D for place in drawn]
        embeds_ND = torch.stack([embedding for embedding in own if embedding is not None])
        ranks_N[drawn] = ranks_of_positives(embeds_ND, embeds_MD, key_N[drawn], gallery_key_M)
    with torch.no_grad():
        texts_ND = torch.cat([embed_texts(encoder, wanted[part]) for part in slices(len(wanted), AT_ONCE)])
    ceiling_N = ranks_of_positives(texts_ND.cpu(), embeds_MD, key_N, gallery_key_M)
    metrics = recall_at(ranks_N) | {"mean_rank": float(ranks_N.double().mean()) + 1}
    metrics |= {f"ceiling/{name}": value for name, value in recall_at(ceiling_N).items()}
    metrics |= {f"chance/r{k}": min(1.0, k / size) for k in (1, 5, 10)}
    return metrics, {each.dialogue.name: rank for each, rank in zip(known, ranks_N.tolist(), strict=True)}


def shown(
    replied: Sequence[Replied],
    generator: NearestPicture,
    ranks: dict[str, int],
    captions: dict[str, str],
    config: AnswerEvaluateConfig,
) -> list[dict[str, Any]]:
    """Requests for the gallery, evenly spread over the split, none chosen, with what came back."""
    made = []
    for each in spread(tuple(replied), config.gallery):
        nearest: tuple[tuple[str, float], ...] = ()
        if each.embedding_D is not None:
            nearest = generator.search(each.embedding_D[None])[0]
        made.append(
            {
                "name": each.dialogue.name,
                "kind": each.dialogue.kind,
                "request": each.dialogue.question,
                "picture": next(iter(each.dialogue.pictures), None),
                "wants": each.dialogue.turns[-1].picture,
                "answer": each.dialogue.turns[-1].answer,
                "said": each.said,
                "returned": [[key, cosine, captions[key]] for key, cosine in nearest],
                "rank": ranks.get(each.dialogue.name) if each.embedding_D is not None else None,
                "routed": each.routed,
            }
        )
    return made


def _right(each: Replied) -> bool:
    return each.embedding_D is None and bool(exact_match(each.said, (each.dialogue.turns[-1].answer,)))
