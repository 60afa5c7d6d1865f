"""The multimodal LLM with its tokenizer: dialogues in, batches and answers out; built from a configuration or a folder.

B dialogues  N distinct pictures  R rows  L columns  P prompt tokens  D width of the words
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from fmray.config.answers import MllmModelConfig
from fmray.config.schema import ImageConfig
from fmray.errors import CheckpointError, DataError
from fmray.models.answering import AnswerBatch, Limits, Said, check_room
from fmray.models.conversation import Renderer
from fmray.models.decoding.generate import Decoder, Sampling, generate, make_decoder
from fmray.models.decoding.running import Running
from fmray.models.gated_attention import Memory
from fmray.models.language import add_adapter, merged_weights
from fmray.models.loading import check_complete
from fmray.models.mllm import Mllm, predictions
from fmray.models.mllm_lines import as_line, last_answer, left_padded, memory_inputs, until
from fmray.models.mllm_output import ReplyTargets, add_output, picture_turns, shown
from fmray.models.mllm_parts import check_lengths, new_mllm
from fmray.models.packing import Line, Packed, pack
from fmray.models.picture_memory import PictureMemory
from fmray.models.preparation import save_picture_preparation
from fmray.models.towers import locate_model
from fmray.models.vqa_answering import resting
from fmray.types import Dialogue, Pictures

LIKELIHOOD_ROW = 1024
"""Columns of a row when answers are scored: many to one picture share its tokens, and a row's attention stays small."""
LOGITS_AT_ONCE = 1024
"""Tokens whose whole vocabulary is in memory at once."""


class MllmAnswering:
    """`Answering` by a multimodal LLM; one call of `answer` at a time: its decoder holds the caches."""

    def __init__(self, model: Mllm, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer
        config = model.config
        self._in_sequence = config.fusion == "concat"
        self.renderer = Renderer(
            tokenizer,
            config.template,
            config.picture_tokens if self._in_sequence else 0,
            config.image_token_id,
            config.output["routing_ids"] if config.output else (),
        )
        self.reply_targets: ReplyTargets | None = None
        """Where what pictures that answer should show comes from, in training; None: the output part learns nothing."""
        self._decoder: tuple[tuple[float, ...], Decoder] | None = None

    @property
    def image(self) -> ImageConfig:
        return self.model.image

    def picture_features(self, pixels_NCHW: Tensor) -> Tensor:
        return self.model.picture_features(pixels_NCHW)

    # ------------------------------------------------------------------------------------------------------------- training

    def collate(self, dialogues: Sequence[Dialogue], pictures: Pictures) -> AnswerBatch:
        """Packed rows; dialogues about the same pictures share them and all words before them."""
        limit = self.model.config.max_tokens
        lines = []
        for dialogue in dialogues:
            spans = self.renderer.fitted(dialogue, limit)
            if not any(span.learns for span in spans):
                raise DataError(f"dialogue '{dialogue.name}': has no answer to learn from")
            lines.append(as_line(dialogue, spans, pictures))
        packed = pack(lines, self.model.config.row_tokens)
        tokens = int(((packed.labels_RL != -100) & (packed.before_RL >= 0)).sum())
        inputs = self._inputs(packed, pictures)
        if self.model.output is not None and self.reply_targets is not None:
            wanted = picture_turns(packed, dialogues, self.renderer.routing_ids[0])
            inputs["reply_embeds"] = self.reply_targets(wanted)
        return AnswerBatch(inputs, tokens, len(dialogues))

    def _inputs(self, packed: Packed, pictures: Pictures) -> dict[str, Tensor]:
        inputs = {
            "input_ids": packed.ids_RL,
            "position_ids": packed.positions_RL,
            "group": packed.group_RL,
            "branch": packed.branch_RL,
            "before": packed.before_RL,
            "labels": packed.labels_RL,
            **self._picture_inputs(pictures),
        }
        if self._in_sequence:
            return {**inputs, "pictures": torch.tensor(packed.pictures, dtype=torch.int64)}
        return {**inputs, **memory_inputs(packed)}

    def _picture_inputs(self, pictures: Pictures) -> dict[str, Tensor]:
        """The distinct pictures; where there is none a black one that no word sees, so that each rank runs the same modules."""
        count, side = max(1, len(pictures.keys)), self.image.size
        valid = torch.full((count,), bool(pictures.keys))
        if pictures.features_NPF is not None:
            features = pictures.features_NPF
            if not pictures.keys:
                features = features.new_zeros((1, *features.shape[1:]))
            return {"image_features": features, "picture_valid": valid}
        pixels = pictures.pixels_NCHW
        if pixels is None or not pictures.keys:
            pixels = torch.zeros((1, 3, side, side), dtype=torch.uint8)
        return {"pixel_values": pixels, "picture_valid": valid}

    # ------------------------------------------------------------------------------------------------------------ answering

    @property
    def limits(self) -> Limits:
        """Dialogues, pictures among their tokens where they stand in the sequence."""
        config = self.model.config
        return Limits(
            config.max_tokens,
            config.max_answer_tokens,
            one_question=False,
            system=self.renderer.takes_system,
        )

    def prompt_tokens(self, dialogue: Dialogue) -> int:
        """Tokens of all turns before the last answer, none left out."""
        return sum(len(span.ids) for span in self.renderer.spans(dialogue, answer=False))

    def answer_room(self, prompt_tokens: int) -> int:
        """The language model's positions that the prompt leaves."""
        return int(self.model.config.text_config.max_position_embeddings) - prompt_tokens

    def answer(
        self,
        dialogues: Sequence[Dialogue],
        pictures: Pictures,
        *,
        beams: int = 1,
        max_new_tokens: int | None = None,
    ) -> list[Said]:
        """Greedy with a cache of keys and values, or the best of some beams; the same alone and in a batch."""
        config = self.model.config
        longest = config.max_answer_tokens if max_new_tokens is None else max_new_tokens
        lines = []
        for dialogue in dialogues:
            spans = self.renderer.fitted(dialogue, config.max_tokens, answer=False)
            lines.append(as_line(dialogue, spans, pictures))
            if max_new_tokens is not None:
                check_room(dialogue.name, longest, self.answer_room(len(lines[-1].ids)))
        ids_BP, mask_BP = left_padded(lines)
        ids_BP, mask_BP = ids_BP.to(self.model.device), mask_BP.to(self.model.device)
        search = self._greedy if beams == 1 else self._beam_search
        with torch.inference_mode(), resting(self.model):
            projected_NPD = None
            if any(line.pictures for line in lines):
                inputs = self._picture_inputs(pictures.to(self.model.device))
                projected_NPD = self.model.projected(inputs.get("pixel_values"), inputs.get("image_features"))
            words_BPD, memory = self.prompts(ids_BP, mask_BP, lines, projected_NPD)
            found = search(ids_BP, mask_BP, words_BPD, memory, longest, beams)
            embeds = shown(self.model, self.prompts, lines, found, projected_NPD)
        return [self.said(*each) for each in zip(found, lines, embeds, strict=True)]

    def running(self, max_rows: int, *, picture_memory_mib: float = 64.0) -> Running:
        """Greedy or drawn; the same as `answer`, whoever else is answered. Made anew after a change of the weights."""
        from fmray.models.mllm_running import MllmSpeaker

        def tower(pixels_NCHW: Tensor) -> Tensor:
            with resting(self.model):
                return self.picture_features(pixels_NCHW)

        memory = PictureMemory(tower, self.model.device, picture_memory_mib)
        return Running(MllmSpeaker(self, self._current_decoder()), memory, max_rows)

    def said(self, ids: Sequence[int], line: Line, embedding_D: Tensor | None) -> Said:
        """An answer of some tokens, the last of which may be its end; the decision for a picture is one too."""
        prompt_tokens = len(line.ids)
        if embedding_D is not None:
            words = ids[: ids.index(self.renderer.routing_ids[0])]
            return Said(self.renderer.text(words), len(words) + 1, prompt_tokens, True, embedding_D)
        ended = bool(ids) and ids[-1] == self.renderer.end_id
        words = ids[:-1] if ended else ids
        return Said(self.renderer.text(words), len(ids), prompt_tokens, ended)

    def prompts(
        self, ids_BP: Tensor, mask_BP: Tensor, lines: Sequence[Line], projected_NPD: Tensor | None
    ) -> tuple[Tensor, Memory | None]:
        """Left-padded prompts as embeddings, and what their words look at with cross-attention."""
        if projected_NPD is None:
            return self.model.prompt_words(ids_BP, None), None
        if self._in_sequence:
            blocks = [picture for line in lines for picture in line.pictures]
            return self.model.prompt_words(ids_BP, projected_NPD[blocks]), None
        words_BPD, shape = self.model.prompt_words(ids_BP, None), ids_BP.shape
        padding_B = (mask_BP == 0).sum(dim=1)
        K = max(len(line.pictures) for line in lines)
        pictures_BK = torch.tensor([[*line.pictures, *[-1] * (K - len(line.pictures))] for line in lines])
        place_BK = torch.arange(K).expand_as(pictures_BK)
        starts = [[*line.starts, *[shape[1]] * (K - len(line.pictures))] for line in lines]
        starts_BK = torch.tensor(starts, device=ids_BP.device) + padding_B[:, None]
        seen_BP = (starts_BK[:, None] <= torch.arange(shape[1], device=ids_BP.device)[:, None]).sum(dim=2)
        on = [t.to(ids_BP.device) for t in (pictures_BK, torch.zeros_like(pictures_BK), place_BK)]
        memory = Memory.of_pictures(projected_NPD, on[0], on[1], on[2], None, seen_BP, shape)
        return words_BPD, memory

    def _greedy(
        self, ids_BP: Tensor, mask_BP: Tensor, words_BPD: Tensor, memory: Memory | None, longest: int, _: int
    ) -> list[list[int]]:
        decoder: Any = self._current_decoder()
        if not self._in_sequence:
            decoder.memory = memory
        rows = torch.arange(len(ids_BP))
        end = self.renderer.end_id
        sampling = Sampling(max_new_tokens=longest, eos_id=end, pad_id=end, greedy=True)
        made = generate(decoder, ids_BP, mask_BP, rows, rows, sampling, words_BPD)
        lengths = made.mask_BT.sum(dim=1).tolist()
        return [ids[:length] for ids, length in zip(made.ids_BT.tolist(), lengths, strict=True)]

    def _beam_search(
        self, _: Tensor, mask_BP: Tensor, words_BPD: Tensor, memory: Memory | None, longest: int, beams: int
    ) -> list[list[int]]:
        end = self.renderer.end_id
        more = {}
        if memory is not None:
            more = {"memory_tokens": memory.tokens_RMD, "memory_visible": memory.visible_RLM}
        settings = GenerationConfig(
            max_new_tokens=longest,
            num_beams=beams,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        ids_BT = self.model.generate(
            inputs_embeds=words_BPD, attention_mask=mask_BP, generation_config=settings, **more
        )
        return [until(ids, end) for ids in ids_BT.tolist()]

    def _current_decoder(self) -> Decoder:
        """The decoder, its copies of the weights renewed where the model has changed since the last answer."""
        now = _fingerprint(self.model)
        if self._decoder is None:
            self._decoder = now, make_decoder(self.model)
        elif self._decoder[0] != now:
            self._decoder[1].refresh()
            self._decoder = now, self._decoder[1]
        return self._decoder[1]

    # ---------------------------------------------------------------------------------------------------------- likelihood

    def likelihood(self, dialogues: Sequence[Dialogue], pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Candidates for one picture share it and all words before them: they cost little more than their own tokens."""
        config = self.model.config
        lines = []
        for dialogue in dialogues:
            spans = self.renderer.fitted(dialogue, config.max_tokens)
            lines.append(as_line(dialogue, last_answer(dialogue, spans), pictures))
        packed = pack(lines, config.row_tokens or max(LIKELIHOOD_ROW, config.max_tokens))
        batch = AnswerBatch(self._inputs(packed, pictures), 0, len(dialogues)).to(self.model.device)
        inputs: dict[str, Any] = dict(batch.inputs)
        with torch.inference_mode(), resting(self.model):
            states_RLD = self.model.body(**inputs).last_hidden_state
            states_TD, targets_T, place = predictions(states_RLD, inputs["labels"], inputs["before"])
            logp_T = self._logp(states_TD, targets_T).cpu()
        owner_T = packed.owner_RL[place[0].cpu(), place[1].cpu()]
        sums_B = torch.zeros(len(lines)).index_add(0, owner_T, logp_T)
        return sums_B, torch.bincount(owner_T, minlength=len(lines))

    def _logp(self, states_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Log-probability of each token, float32 [T], the whole vocabulary of some at a time."""
        pieces = []
        for start in range(0, len(targets_T), LOGITS_AT_ONCE):
            some = slice(start, start + LOGITS_AT_ONCE)
            logits_TV = self.model.said_next(states_TD[some]).float()
            pieces.append(-F.cross_entropy(logits_TV, targets_T[some], reduction="none"))
        return torch.cat(pieces)

    # -------------------------------------------------------------------------------------------------------------- on disk

    def hold_locked_parts(self) -> None:
        """Told once it is settled what learns: parts that do not stay in evaluation mode."""
        self.model.train(self.model.training)

    def plain_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights under the names of the model without adapters, each adapter added into its matrix."""
        return merged_weights(self.model, weights)

    def empty_copy(self) -> MllmAnswering:
        with no_init_weights():
            model = Mllm(copy.deepcopy(self.model.config))
        model.tie_weights()  # left out there as well
        return MllmAnswering(model, self.tokenizer)

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """config.json, model.safetensors (adapters merged, tied weights once), tokenizer, preprocessor_config.json.

        `weights` may hold more than is saved (buffers); raises CheckpointError where one is missing.
        """
        merged = self.plain_weights(weights)
        with torch.device("meta"):
            bare = Mllm(copy.deepcopy(self.model.config))
        names = set(bare.state_dict()) - set(bare.all_tied_weights_keys)
        missing = sorted(names - merged.keys())
        if missing:
            raise CheckpointError(f"{folder}: the weights to save lack {missing[0]} ({len(missing)} in all)")
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(folder)
        plain = {name: merged[name].detach().cpu().contiguous() for name in sorted(names)}
        save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save_pretrained(folder)
        save_picture_preparation(self.image, folder)


def _fingerprint(model: Mllm) -> tuple[float, ...]:
    """Changes with the weights: counts of writes, and a few numbers of each tensor for those who write past the counts."""
    speaking = [*model.language.parameters(), *(model.output.decision.parameters() if model.output else ())]
    writes = sum(parameter._version for parameter in speaking)
    samples = [p.detach().flatten()[:: max(1, p.numel() // 8)].float().sum() for p in speaking if p.numel()]
    return (float(writes), *torch.stack(samples).tolist())


# ------------------------------------------------------------------------------------------------------------------- building


def build_mllm(config: MllmModelConfig) -> MllmAnswering:
    """From tower and language model, or from a saved one with the new configuration's template, lengths and adapter.

    Raises ConfigError with the key.
    """
    if config.checkpoint is not None:
        answering = load_mllm(locate_model(config.checkpoint, "model.checkpoint"), torch.device("cpu"))
        model, tokenizer = answering.model, answering.tokenizer
    else:
        model, tokenizer = new_mllm(config)
    for name in ("template", "max_tokens", "max_answer_tokens", "row_tokens"):
        setattr(model.config, name, getattr(config, name))
    check_lengths(model)
    if config.output is not None:
        add_output(model, tokenizer, config.output)
    answering = MllmAnswering(model, tokenizer)
    if config.lora is not None:
        add_adapter(model.language, config.lora, "model.lora")
    return answering


def load_mllm(folder: str | Path, device: torch.device) -> MllmAnswering:
    """A saved multimodal LLM, ready to answer; only safetensors are read. Raises CheckpointError in one line."""
    try:
        model, info = Mllm.from_pretrained(
            str(folder), use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from None
    check_complete(info, folder)
    return MllmAnswering(model.to(device).eval(), tokenizer)
