"""The VQA model with what turns dialogues into its tensors and its tokens into words.

B dialogues  N distinct pictures  Q distinct questions  P tokens of a picture  S tokens of a question  T tokens of an answer
F width of a tower
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fmray.config.answers import VqaModelConfig
from fmray.config.schema import ImageConfig
from fmray.errors import CheckpointError, ConfigError, DataError
from fmray.models.answering import AnswerBatch, Limits, Said, check_room
from fmray.models.decoding.running import Running
from fmray.models.picture_memory import PictureMemory
from fmray.models.preparation import save_picture_preparation
from fmray.models.vqa import VqaConfig, VqaModel
from fmray.models.vqa_build import ANSWER_TOKENIZER, build_parts, open_parts
from fmray.types import Dialogue, Pictures

MOST_QUESTIONS = 262_144
"""Distinct questions whose token ids are kept: more than VQA v2's training split has."""
LONGEST_KEPT = 256
"""Questions of more characters are not kept: a server's callers choose them, and memory is bounded."""


STANDARDIZE_BY = 1024
"""Distinct questions that `standardize` looks at."""


class VqaAnswering:
    """A VQA model and its two tokenizers, as `Answering` asks."""

    def __init__(
        self,
        model: VqaModel,
        question_tokenizer: PreTrainedTokenizerFast,
        answer_tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self.model = model
        self.question_tokenizer = question_tokenizer
        self.answer_tokenizer = answer_tokenizer
        # a copy: cutting is a state of the tokenizer, and serving counts in other threads than the one that answers
        self._uncut = Tokenizer.from_str(question_tokenizer.backend_tokenizer.to_str())
        self._uncut.no_truncation()
        self._uncut.no_padding()
        self.remember_questions = False
        """A locked question tower's outputs are kept, one per distinct question, on the CPU in fp32."""
        self.question_memory_mib = 256.0
        """What is kept at most; questions beyond it pass the tower each time."""
        self._question_ids: dict[str, list[int]] = {}
        self._question_states: dict[str, Tensor] = {}
        self._kept_bytes = 0

    @property
    def image(self) -> ImageConfig:
        """How a picture is prepared."""
        return self.model.image

    def picture_features(self, pixels_NCHW: Tensor) -> Tensor:
        """The picture tower's tokens, float32 [N, P, F], on the model's device and without graph; uint8 pixels in."""
        with torch.no_grad(), resting(self.model):
            return self.model.picture_tokens(pixels_NCHW.to(self.model.device)).float()

    # --------------------------------------------------------------------------------------------------------- tensors

    def collate(self, dialogues: Sequence[Dialogue], pictures: Pictures) -> AnswerBatch:
        """A training batch, distinct pictures and questions once each; raises DataError with the dialogue's name."""
        inputs = self._asked(dialogues, pictures)
        answers = [self._answer_ids(dialogue) for dialogue in dialogues]
        inputs["decoder_input_ids"] = _padded(answers, self.model.config.end_id)
        inputs["labels"] = _padded(answers, -100)
        return AnswerBatch(inputs, sum(len(ids) - 1 for ids in answers), len(dialogues))

    def _asked(self, dialogues: Sequence[Dialogue], pictures: Pictures) -> dict[str, Tensor]:
        """Pictures and questions as arguments of `forward` and `generate`."""
        for dialogue in dialogues:
            _check(dialogue, pictures)
        keys = [dialogue.pictures[0] for dialogue in dialogues]
        distinct = list(dict.fromkeys(keys))
        rows = torch.tensor(pictures.rows(distinct))
        place = {key: row for row, key in enumerate(distinct)}
        inputs = {"picture_of_B": torch.tensor([place[key] for key in keys])}
        for name, given in (
            ("pixel_values", pictures.pixels_NCHW),
            ("image_features", pictures.features_NPF),
        ):
            if given is not None:
                inputs[name] = given[rows.to(given.device)]
        return inputs | self._questions([dialogue.question for dialogue in dialogues])

    def _questions(self, questions: Sequence[str]) -> dict[str, Tensor]:
        """Each distinct question's ids, or the states that its locked tower made of it."""
        distinct = list(dict.fromkeys(questions))
        place = {question: row for row, question in enumerate(distinct)}
        ids = [self._ids_of(question) for question in distinct]
        inputs = {
            "question_of_B": torch.tensor([place[question] for question in questions]),
            "attention_mask": _padded([[1] * len(tokens) for tokens in ids], 0),
        }
        if self.remember_questions and self._text_is_still:
            return inputs | {"question_features": self._states_of(distinct)}
        return inputs | {"input_ids": _padded(ids, self._question_pad)}

    @torch.no_grad()
    def standardize(self, questions: Sequence[str]) -> None:
        """Begin the questions' projection as if their states had mean 0 and deviation 1 over these questions.

        The states of a pretrained tower share a large common part (0.84 of DistilBERT's length on easy-vqa), beside which what
        tells one word from another is small: w' = w / σ, b' = b − w'·μ. The model stays one linear map.
        """
        if not questions:
            raise ConfigError("model.standardize", True, "there are no training questions to standardize by")
        ids = [self._ids_of(question) for question in questions]
        mask_QS = _padded([[1] * len(tokens) for tokens in ids], 0)
        with resting(self.model):
            states_QSF = self.model.question_tokens(_padded(ids, self._question_pad), mask_QS)
        states_NF = states_QSF[mask_QS.bool()].float()
        projection = self.model.text_projection
        projection.weight.div_(states_NF.std(0).clamp(min=1e-6))
        projection.bias.sub_(projection.weight @ states_NF.mean(0))

    @property
    def _text_is_still(self) -> bool:
        """Whether the question tower is locked and whole here: ZeRO-3's shards are gathered by all ranks at once only."""
        weights = self.model.text.parameters()
        return not any(weight.requires_grad or hasattr(weight, "ds_tensor") for weight in weights)

    @property
    def _question_pad(self) -> int:
        return int(self.question_tokenizer.pad_token_id or 0)

    def _ids_of(self, question: str) -> list[int]:
        found = self._question_ids.get(question)
        if found is None:
            longest = self.model.config.max_question_tokens
            encoded = self.question_tokenizer(question, truncation=True, max_length=longest)["input_ids"]
            # a tokenizer that adds nothing makes nothing of an empty question, and a tower needs a token
            found = list(encoded) or [self._question_pad]
            if len(question) <= LONGEST_KEPT:
                if len(self._question_ids) >= MOST_QUESTIONS:
                    self._question_ids.clear()
                self._question_ids[question] = found
        return found

    def _states_of(self, questions: Sequence[str]) -> Tensor:
        """The tower's states of some questions, float32 [Q, S, F] on the CPU, zeros at padding."""
        states = {q: self._question_states[q] for q in questions if q in self._question_states}
        missing = [question for question in questions if question not in states]
        if missing:
            ids = [self._ids_of(question) for question in missing]
            device = self.model.device
            # plain tensors whoever asks first: training may read what an endpoint kept
            with torch.inference_mode(False), torch.no_grad(), resting(self.model):
                made_QSF = self.model.question_tokens(
                    _padded(ids, self._question_pad).to(device),
                    _padded([[1] * len(tokens) for tokens in ids], 0).to(device),
                )
            for question, tokens, made_SF in zip(missing, ids, made_QSF.float().cpu(), strict=True):
                states[question] = made_SF[: len(tokens)].clone()
                size = states[question].numel() * states[question].element_size()
                if self._kept_bytes + size <= self.question_memory_mib * 2**20:
                    self._question_states[question] = states[question]
                    self._kept_bytes += size
        return torch.nn.utils.rnn.pad_sequence([states[question] for question in questions], batch_first=True)

    def _answer_ids(self, dialogue: Dialogue) -> list[int]:
        """`<start> answer <end>`: at most `max_answer_tokens` behind the start, of which the end is the last."""
        ids = self.answer_tokenizer(dialogue.turns[-1].answer.strip(), add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(f"dialogue '{dialogue.name}': no answer token to learn from or to score")
        return [
            self.model.config.start_id,
            *ids[: self.model.config.max_answer_tokens - 1],
            self.model.config.end_id,
        ]

    # ----------------------------------------------------------------------------------------------------------- words

    @property
    def limits(self) -> Limits:
        """One question, cut where it is longer."""
        config = self.model.config
        return Limits(config.max_question_tokens, config.max_answer_tokens, one_question=True, system=False)

    def prompt_tokens(self, dialogue: Dialogue) -> int:
        """Tokens of the whole question, also of one that will be cut."""
        return len(self._uncut.encode(dialogue.question).ids)

    def answer_room(self, prompt_tokens: int) -> int:
        """The decoder's positions: the question stands in none of them, and the answer's last token is not read."""
        return int(self.model.config.decoder_config.n_positions)

    def answer(
        self,
        dialogues: Sequence[Dialogue],
        pictures: Pictures,
        *,
        beams: int = 1,
        max_new_tokens: int | None = None,
    ) -> list[Said]:
        """What the model says to each dialogue's question, whose answer is not read; greedy, or the best of some beams."""
        longest = self.model.config.max_answer_tokens if max_new_tokens is None else max_new_tokens
        for dialogue in dialogues if max_new_tokens is not None else ():
            check_room(dialogue.name, longest, self.answer_room(0))
        inputs = self._on_device(self._asked(dialogues, pictures))
        with resting(self.model):
            made = self.model.generate(**inputs, max_new_tokens=longest, num_beams=beams, do_sample=False)
        return [
            self.said(ids, self.question_length(dialogue))
            for dialogue, ids in zip(dialogues, made.tolist(), strict=True)
        ]

    def running(self, max_rows: int, *, picture_memory_mib: float = 64.0) -> Running:
        """Greedy or drawn; the same as `answer`, whoever else is answered. Made anew after a change of the weights."""
        from fmray.models.vqa_running import VqaSpeaker

        memory = PictureMemory(self.picture_features, self.model.device, picture_memory_mib)
        return Running(VqaSpeaker(self), memory, max_rows)

    def said(self, ids: Sequence[int], prompt_tokens: int) -> Said:
        """An answer of some tokens, among which may be its end."""
        end = self.model.config.end_id
        ended = end in ids
        words = ids[: ids.index(end)] if ended else ids
        return Said(self.words(words).strip(), len(words) + ended, prompt_tokens, ended)

    def words(self, ids: Sequence[int]) -> str:
        """An answer's tokens as words, special tokens left out."""
        text: str = self.answer_tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def question_length(self, dialogue: Dialogue) -> int:
        """Tokens of the question that are read."""
        return len(self._ids_of(dialogue.question))

    def sides(
        self, dialogues: Sequence[Dialogue], pictures: Pictures
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the decoder's memories are made of: distinct pictures [N, P, D] and questions [Q, S, D], the questions' mask
        [Q, S], and each dialogue's picture and question, int64 [B]. Raises DataError with the dialogue's name.
        """
        given = self._on_device(self._asked(dialogues, pictures))
        names = ("input_ids", "attention_mask", "pixel_values", "image_features", "question_features")
        with resting(self.model):
            sides = self.model.sides(*(given.get(name) for name in names))
        return (*sides, given["picture_of_B"], given["question_of_B"])

    def likelihood(self, dialogues: Sequence[Dialogue], pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Σ log-probability of each dialogue's answer, end of text included, float32 [B], and its tokens, int64 [B]."""
        inputs = self._on_device(self.collate(dialogues, pictures).inputs)
        next_BT = inputs.pop("labels")[:, 1:]
        with torch.inference_mode(), resting(self.model):
            logits_BTV = self.model(**inputs).logits[:, :-1].float()
        # cross-entropy is −log p; 0 at the labels that it passes over
        against_BT = F.cross_entropy(logits_BTV.transpose(1, 2), next_BT, reduction="none")
        return -against_BT.sum(1).cpu(), (next_BT != -100).sum(1).cpu()

    def _on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    # ------------------------------------------------------------------------------------------------ training and disk

    def hold_locked_parts(self) -> None:
        """Told once it is settled what learns: locked parts stay in evaluation mode, a locked text tower's states are kept."""
        self.model.train(self.model.training)  # it goes by what learns
        self.remember_questions = self._text_is_still

    def plain_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights as they are: this model takes no adapter."""
        return dict(weights)

    def empty_copy(self) -> VqaAnswering:
        """The same configuration with weights that are still to be loaded, on the CPU."""
        config = VqaConfig.from_dict(self.model.config.to_dict())
        return VqaAnswering(VqaModel(config), self.question_tokenizer, self.answer_tokenizer)

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """config.json, model.safetensors (a shared output matrix once), both tokenizers, preprocessor_config.json.

        `weights` may hold more than is saved (buffers); raises CheckpointError where one is missing.
        """
        names = set(self.model.state_dict()) - set(self.model.all_tied_weights_keys)
        missing = sorted(names - weights.keys())
        if missing:
            raise CheckpointError(f"{folder}: the weights to save lack {missing[0]} ({len(missing)} in all)")
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(folder)
        plain = {name: weights[name].detach().cpu().contiguous() for name in sorted(names)}
        save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
        self.question_tokenizer.save_pretrained(folder)
        self.answer_tokenizer.save_pretrained(folder / ANSWER_TOKENIZER)
        save_picture_preparation(self.image, folder)


@contextmanager
def resting(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode: no dropout."""
    if not model.training:  # walking through all modules takes as long as a small model's step
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _check(dialogue: Dialogue, pictures: Pictures) -> None:
    """One turn, one picture, and that picture there."""
    name, count = dialogue.name, len(dialogue.pictures)
    other = "the multimodal LLM (model.kind=mllm) takes more"
    if dialogue.system:
        raise DataError(f"dialogue '{name}': the VQA model takes no system message")
    if len(dialogue.turns) != 1:
        raise DataError(
            f"dialogue '{name}': the VQA model answers one question, it has {len(dialogue.turns)} turns: {other}"
        )
    if count != 1:
        cure = f": {other}" if count else ""
        raise DataError(f"dialogue '{name}': the VQA model needs one picture, it has {count}{cure}")
    if dialogue.pictures[0] not in pictures.keys:
        raise DataError(
            f"dialogue '{name}': its picture {dialogue.pictures[0]} is not among those of the batch"
        )


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """int64 [len(rows), longest], filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def build_vqa(config: VqaModelConfig, dialogues: Sequence[Dialogue] = ()) -> VqaAnswering:
    """The model that a configuration asks for, in fp32 on the CPU; raises ConfigError with the key.

    dialogues: what `model.decoder.tokenizer=answers` is learned from, whose questions `model.standardize` looks at.
    """
    answering = VqaAnswering(*build_parts(config, dialogues))
    if config.standardize and config.checkpoint is None:
        distinct = dict.fromkeys(dialogue.question for dialogue in dialogues)
        answering.standardize(
            [question for question, _ in zip(distinct, range(STANDARDIZE_BY), strict=False)]
        )
    return answering


def load_vqa(folder: str | Path, device: torch.device) -> VqaAnswering:
    """A saved VQA model, ready to answer; only safetensors are read. Raises CheckpointError where it cannot be."""
    answering = VqaAnswering(*open_parts(Path(folder)))
    answering.model.to(device).eval()
    return answering
