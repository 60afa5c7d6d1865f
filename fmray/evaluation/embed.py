"""A data set's test split through a dual encoder, and what comes of it: the numbers of a model.

B samples of a batch  C,H,W pixels  T tokens  D width of the shared space

Batches are cut from the split, not from a rank's share, and whole batches are dealt to ranks: which samples
are computed together, and so every bit of an embedding, does not depend on the number of ranks.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fmray.config.schema import (
    DataConfig,
    EmojiSource,
    EvaluateConfig,
    EvaluateRunConfig,
    ImageConfig,
    SourceConfig,
)
from fmray.data.loader import caption_key
from fmray.data.sources import Source, open_source
from fmray.data.transforms import compose, decode_rgba, white
from fmray.errors import DataError
from fmray.evaluation.retrieval import PairEmbeddings, evaluate_retrieval, own_share, slices
from fmray.evaluation.zero_shot import ZeroShot, class_embeddings, evaluate_zero_shot
from fmray.models.clip import DualEncoder
from fmray.models.saved import LoadedDualEncoder, load_dual_encoder
from fmray.runtime.context import Context, Outcome
from fmray.types import ImageText, Metrics

log = logging.getLogger(__name__)


def embed_texts(
    encoder: LoadedDualEncoder, texts: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Tensor:
    """Unit vectors float32 [len(texts), D]; several templates are averaged."""
    padding = "max_length" if encoder.model.config.pad_to_max else "longest"

    def encode(sentences: list[str]) -> Tensor:
        tokens = encoder.tokenizer(
            sentences,
            padding=padding,
            truncation=True,
            max_length=encoder.max_tokens,
            padding_side="right",
            return_tensors="pt",
        ).to(encoder.model.device)
        return encoder.model.encode_text(tokens["input_ids"], tokens["attention_mask"])

    return class_embeddings(encode, texts, templates)


def embed_pictures(encoder: LoadedDualEncoder, rgba_B4HW: Tensor) -> Tensor:
    """Unit vectors float32 [B, D] of decoded pictures, uint8, over white."""
    pixels_BCHW = compose(rgba_B4HW, white(len(rgba_B4HW)))
    return encoder.model.encode_image(pixels_BCHW.to(encoder.model.device))


def read_sample(source: Source, index: int, image: ImageConfig) -> tuple[ImageText, Tensor] | None:
    """A sample and its pixels uint8 [4, S, S]; None, and a line in the log, where it cannot be read."""
    try:
        sample = source[index]
        return sample, decode_rgba(sample.image, image, name=sample.name)
    except DataError as error:
        log.warning("left out of the evaluation: %s", error)
        return None


def embed_batch(
    encoder: LoadedDualEncoder, source: Source, part: slice, templates: Sequence[str]
) -> PairEmbeddings:
    """The readable samples of a batch. Always one picture forward and one text forward per template:
    under ZeRO-3 a forward is a collective call, so its number may not depend on the data.
    """
    size = encoder.image.size
    read = [read_sample(source, i, encoder.image) for i in range(part.start, part.stop)]
    blank = ImageText("blank", b"", ("blank",)), torch.full((4, size, size), 255, dtype=torch.uint8)
    samples, pixels = zip(*[pair or blank for pair in read], strict=True)
    captions = [caption for sample in samples for caption in sample.captions]
    owner = [row for row, sample in enumerate(samples) for _ in sample.captions]
    device = encoder.model.device
    batch = PairEmbeddings(
        embed_pictures(encoder, torch.stack(pixels)),
        torch.arange(part.start, part.stop, device=device),
        embed_texts(encoder, captions, templates),
        torch.tensor(owner, device=device),
        torch.tensor([caption_key(caption) for caption in captions], device=device),
    )
    return batch.only(torch.tensor([pair is not None for pair in read], device=device))


def embed_pairs(
    encoder: LoadedDualEncoder,
    source: Source,
    evaluate: EvaluateConfig,
    max_bad_share: float,
    context: Context,
) -> PairEmbeddings:
    """This rank's pairs of a split; those of all ranks, in the order of ranks, are the split in its order.

    Raises DataError on every rank where the split is empty or more than `max_bad_share` of it cannot be read.
    """
    count = min(len(source), evaluate.max_samples or len(source))
    if not count:
        raise DataError("the test split is empty: there is nothing to evaluate on")
    batches = slices(count, evaluate.batch_size)
    each = -(-len(batches) // context.world_size)
    own = []
    for index in range(context.rank * each, (context.rank + 1) * each):
        # a rank without a batch left joins in the last one and drops it: forwards are collective (ZeRO-3)
        part = batches[min(index, len(batches) - 1)]
        batch = embed_batch(encoder, source, part, evaluate.templates)
        mine = torch.full((len(batch.image_ND),), index < len(batches), device=batch.image_ND.device)
        own.append(batch.only(mine))
    pairs = PairEmbeddings.joined(own)
    bad = count - int(context.sum(torch.tensor(len(pairs.image_ND), device=context.device)))
    if bad > max_bad_share * count:
        share = f"more than data.max_bad_share={max_bad_share}"
        raise DataError(f"{bad} of {count} test samples cannot be read, {share}; the log names them")
    return pairs


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, fp32, no gradient; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        # not inference_mode: what ZeRO-3 gathers in it could not be trained on afterwards
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def embedded_splits(
    encoder: LoadedDualEncoder, data: DataConfig, evaluate: EvaluateConfig, context: Context
) -> Iterator[tuple[str, Source, PairEmbeddings]]:
    """What is measured: (prefix of metrics, test split, this rank's pairs); for emoji one per language."""
    sources: dict[str, SourceConfig] = {"eval": data.source}
    if isinstance(data.source, EmojiSource):
        sources = {
            "eval" if language == "en" else f"eval/{language}": data.source.replace(languages=(language,))
            for language in evaluate.languages
        }
    for prefix, config in sources.items():
        source = open_source(config, "test")
        with measuring(encoder.model):
            pairs = embed_pairs(encoder, source, evaluate, data.max_bad_share, context)
        yield prefix, source, pairs


def evaluate_pairs(
    model: DualEncoder,
    tokenizer: PreTrainedTokenizerFast,
    image: ImageConfig,
    max_tokens: int,
    data: DataConfig,
    evaluate: EvaluateConfig,
    context: Context,
) -> Metrics:
    """Retrieval on the test split, for emoji names in each language; every rank gets the same numbers.

    Names: `eval/image_to_text/r5`, …; languages other than English: `eval/ko/image_to_text/r5`. The model
    stays in the mode it was in. Raises DataError as `embed_pairs` and `evaluate_retrieval` do.
    """
    encoder = LoadedDualEncoder(model, tokenizer, image, max_tokens)
    metrics: Metrics = {}
    for prefix, _, pairs in embedded_splits(encoder, data, evaluate, context):
        metrics |= evaluate_retrieval(pairs, context, prefix)
    return metrics


def caption_of(source: Source, pairs: PairEmbeddings, row: int) -> str:
    """The text of a caption row, found again among the captions of the sample it came with."""
    sample = source[int(pairs.sample_N[pairs.owner_P[row]])]
    return next(text for text in sample.captions if caption_key(text) == int(pairs.caption_P[row]))


def classify_captions(
    source: Source, own: PairEmbeddings, context: Context
) -> tuple[list[str], ZeroShot] | None:
    """Zero-shot classification where captions are classes: their names and the result.

    None where they are not: a picture with several captions, or fewer than two pictures for each on average.
    """
    gathered = own.gathered(context)
    pairs, image_key_N, text_key_C = gathered.distinct()
    pictures, classes = len(pairs.image_ND), len(pairs.text_PD)
    if len(gathered.text_PD) > pictures or 2 * classes > pictures:
        return None
    label_N = (image_key_N[:, None] == text_key_C).int().argmax(dim=1)
    names = without_common_start([caption_of(source, pairs, row) for row in range(classes)])
    mine, labels = own_share(pairs.image_ND, context), own_share(label_N, context)
    return names, evaluate_zero_shot(mine, labels, pairs.text_PD, context)


def without_common_start(names: list[str]) -> list[str]:
    """`["a photo of a cat", "a photo of a cow"]` to `["cat", "cow"]`: whole words only."""
    words = [name.split() for name in names]
    alike = [len(set(column)) == 1 for column in zip(*words, strict=False)]
    shared = min([*(len(name) - 1 for name in words), [*alike, False].index(False)])
    return [" ".join(name[shared:]) for name in words]


def evaluate(config: EvaluateRunConfig, context: Context) -> Outcome:
    """Measure a saved model; reports, and writes `evaluation.json` in the run folder.

    Retrieval always; where captions are classes, zero-shot accuracy too, and the confusion matrix in the file.
    """
    started = time.perf_counter()
    loaded = load_dual_encoder(config.checkpoint, context.device)
    metrics: Metrics = {}
    result: dict[str, object] = {"checkpoint": config.checkpoint, "metrics": metrics}
    for prefix, source, pairs in embedded_splits(loaded, config.data, config.evaluate, context):
        metrics |= evaluate_retrieval(pairs, context, prefix)
        if classified := classify_captions(source, pairs, context):
            names, zero_shot = classified
            metrics |= zero_shot.metrics
            result |= {"classes": names, "confusion": zero_shot.confusion_CC.tolist()}
    metrics["time/evaluate"] = time.perf_counter() - started
    context.report(0, metrics)
    if context.rank == 0:
        context.folder.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "evaluation.json")
    return Outcome(steps=0, finished=True)
