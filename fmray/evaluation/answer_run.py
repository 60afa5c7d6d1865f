"""A model's answers to the test split of a source, measured and written down: in a training, and of a saved model."""

from __future__ import annotations

import json
import time

from fmray.config.answers import AnswerEvaluateConfig, AnswersEvaluateRunConfig
from fmray.config.dialogues import DialogueDataConfig, RequestSource
from fmray.data.dialogues import open_dialogues
from fmray.errors import ConfigError
from fmray.evaluation.answers import evaluate_answers
from fmray.evaluation.replies import evaluate_replies, load_clip_of
from fmray.models.answering import Answering, load_answering
from fmray.models.mllm_answering import MllmAnswering
from fmray.runtime.context import Context, Outcome
from fmray.types import Metrics


def measure(
    done: int,
    answering: Answering,
    data: DialogueDataConfig,
    evaluate: AnswerEvaluateConfig,
    context: Context,
) -> Metrics:
    """Answers beside the blind baselines (requests: decisions and pictures), written to `evaluation.json` too; a collective."""
    started = time.perf_counter()
    answering.model.to(context.device)
    test, bad = open_dialogues(data.source, "test"), data.max_bad_share
    if isinstance(data.source, RequestSource):
        if not isinstance(answering, MllmAnswering):
            raise ConfigError("data.source.kind", "requests", "a VQA model does not answer with pictures")
        encoder = load_clip_of(answering, context.device)
        metrics, details = evaluate_replies(answering, encoder, test, evaluate, context, max_bad_share=bad)
    else:
        train = open_dialogues(data.source, "train")
        metrics, details = evaluate_answers(answering, test, evaluate, context, train, max_bad_share=bad)
    answering.model.to("cpu")
    if context.rank == 0:
        text = json.dumps({"step": done, "metrics": metrics, **details}, indent=1, ensure_ascii=False)
        context.folder.write_text(text + "\n", "evaluation.json")
    return metrics | {"time/evaluate": time.perf_counter() - started}


def evaluate_saved(config: AnswersEvaluateRunConfig, context: Context) -> Outcome:
    """Measure a saved model; reports, and writes `evaluation.json` in the run folder."""
    answering = load_answering(config.checkpoint, context.device)
    answering.model.requires_grad_(False)
    answering.hold_locked_parts()  # each distinct question passes its tower once
    context.report(0, measure(0, answering, config.data, config.evaluate, context))
    return Outcome(steps=0, finished=True)
