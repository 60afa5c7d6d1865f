"""The VQA model: picture tower and question tower, projected and fused, and a decoder whose cross-attention reads them.

B questions  N distinct pictures  Q distinct questions  P tokens of a picture  S tokens of a question  T tokens of an answer
C,H,W pixels  F width of a tower  D width of the decoder  M tokens of the memory  V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from fmray.config.schema import ImageConfig
from fmray.models.answering import AnswerOutput
from fmray.models.preparation import normalized_pixels
from fmray.models.towers import hold_batch_norm, is_convolutional, new_tower, sub_config, tower_width

Fusion = Literal["concat", "mean"]


class VqaConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """What a saved VQA model is made of."""

    model_type = "fmray_vqa"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig, "decoder_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        decoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_layer: int = -1,
        fusion: Fusion = "concat",
        image: dict[str, Any] | None = None,
        hold_batch_norm: bool = True,
        max_question_tokens: int = 32,
        max_answer_tokens: int = 8,
        **rest: Any,
    ) -> None:
        self.vision_config = sub_config(vision_config, "vit")
        self.text_config = sub_config(text_config, "distilbert")
        self.decoder_config = sub_config(decoder_config, "gpt2")
        self.decoder_config.add_cross_attention = True
        self.decoder_config.is_decoder = True
        self.text_layer = text_layer
        self.fusion = fusion
        self.image = image or ImageConfig().model_dump(mode="json")
        self.hold_batch_norm = hold_batch_norm
        self.max_question_tokens = max_question_tokens
        self.max_answer_tokens = max_answer_tokens
        rest |= {"is_encoder_decoder": True, "tie_word_embeddings": self.decoder_config.tie_word_embeddings}
        super().__init__(**rest)

    @property
    def start_id(self) -> int:
        """The token that an answer begins with: the decoder's beginning of text, or its end where it has none."""
        start = self.decoder_config.bos_token_id
        return int(self.decoder_config.eos_token_id if start is None else start)

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return int(self.decoder_config.eos_token_id)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The decoder's: what transformers sizes the cache by. It would take the question tower's, by its name."""
        return self.text_config if encoder and not decoder else self.decoder_config


@dataclass
class Fused(ModelOutput):  # type: ignore[misc]  # transformers is untyped here
    """What the decoder attends to. The mask is part of it, so that beams multiply both alike."""

    last_hidden_state: Tensor | None = None
    """[B, M, D]."""
    attention_mask: Tensor | None = None
    """int64 [B, M], 1 at what may be attended to."""


class VqaModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Answers questions about pictures. Every parameter is read inside `forward` (ZeRO-3's rule)."""

    config_class = VqaConfig
    base_model_prefix = "vqa"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []  # noqa: RUF012

    def __init__(
        self,
        config: VqaConfig,
        vision: PreTrainedModel | None = None,
        text: PreTrainedModel | None = None,
        decoder: GPT2LMHeadModel | None = None,
    ) -> None:
        super().__init__(config)
        self.vision = vision if vision is not None else new_tower(config.vision_config)
        self.text = text if text is not None else new_tower(config.text_config)
        self._memory_format = torch.contiguous_format
        if is_convolutional(config.vision_config):
            self._memory_format = torch.channels_last
            self.vision.to(memory_format=self._memory_format)
        width = config.decoder_config.hidden_size
        self.vision_projection = nn.Linear(tower_width(config.vision_config), width)
        self.text_projection = nn.Linear(tower_width(config.text_config), width)
        self.decoder = decoder if decoder is not None else GPT2LMHeadModel(config.decoder_config)
        self.image = ImageConfig.model_validate(config.image)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Only our own layers: towers and decoder come initialised by their own classes."""
        if isinstance(module, nn.Linear) and module in (self.vision_projection, self.text_projection):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> VqaModel:
        """A locked part has no dropout: what a tower says of a picture or a question is always the same, and can be kept."""
        super().train(mode)
        for part in (self.vision, self.text, self.decoder):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        if self.config.hold_batch_norm:
            hold_batch_norm(self)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's table of words."""
        return self.decoder.get_input_embeddings()  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's output matrix, which GPT-2 shares with its table."""
        return self.decoder.get_output_embeddings()  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------------------ both sides

    def picture_tokens(self, pixels_NCHW: Tensor) -> Tensor:
        """uint8 pixels [N, 3, H, W] (or float in 0..1) to the tower's tokens [N, P, F]; a feature map's places are tokens."""
        pixels_NCHW = normalized_pixels(pixels_NCHW, self.image).contiguous(memory_format=self._memory_format)
        states: Tensor = self.vision(pixel_values=pixels_NCHW).last_hidden_state
        return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states

    def question_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask, int64 [Q, S], to the states of the tower's layer that is read, [Q, S, F]."""
        deep = self.config.text_layer != -1
        outputs = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **({"output_hidden_states": True} if deep else {}),
        )
        states: Tensor = outputs.last_hidden_state
        if deep:
            # the layers above are computed for nobody: zero times their end leaves no parameter without a gradient
            states = outputs.hidden_states[self.config.text_layer] + 0.0 * states
        return states

    def sides(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        image_features: Tensor | None,
        question_features: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct pictures [N, P, D] and questions [Q, S, D] in the decoder's width, and the questions' mask [Q, S]."""
        if image_features is None:
            if pixel_values is None:
                raise ValueError("pixel_values or image_features: one of them is needed")
            image_features = self.picture_tokens(pixel_values)
        if question_features is None:
            if input_ids is None:
                raise ValueError("input_ids or question_features: one of them is needed")
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            question_features = self.question_tokens(input_ids, attention_mask)
        elif attention_mask is None:
            attention_mask = question_features.new_ones(question_features.shape[:2], dtype=torch.long)
        return self.vision_projection(image_features), self.text_projection(question_features), attention_mask

    def fused(
        self,
        seen: Tensor,
        asked: Tensor,
        mask: Tensor,
        picture_of_B: Tensor | None,
        question_of_B: Tensor | None,
    ) -> Fused:
        """What the decoder reads, of `sides`."""
        seen, asked, mask = _rows(seen, picture_of_B), _rows(asked, question_of_B), _rows(mask, question_of_B)
        if self.config.fusion == "mean":
            weight_BS1 = mask.to(asked.dtype).unsqueeze(-1)
            asked_BD = (asked * weight_BS1).sum(1) / weight_BS1.sum(1).clamp(min=1)
            memory_B1D = ((seen.mean(1) + asked_BD) / 2).unsqueeze(1)
            return Fused(memory_B1D, mask.new_ones(len(memory_B1D), 1))
        return Fused(torch.cat([seen, asked], dim=1), torch.cat([mask.new_ones(seen.shape[:2]), mask], dim=1))

    def keys_and_values(
        self,
        seen_NPD: Tensor,
        asked_QSD: Tensor,
        mask_QS: Tensor,
        picture_of_B: Tensor | None,
        question_of_B: Tensor | None,
    ) -> tuple[Fused, EncoderDecoderCache]:
        """As `fused` by concatenation, but as the keys and values of every layer, made once per distinct picture and question.

        A memory of P + S tokens is projected in every layer, and a batch has far fewer pictures and questions than rows: this is
        the larger part of a small decoder's work. transformers' cache of them is where GPT-2 looks before it makes its own.
        """
        cache = DynamicCache()
        for layer, block in enumerate(self.decoder.transformer.h):
            attention = block.crossattention
            of_pictures = _rows(attention.c_attn(seen_NPD), picture_of_B)
            of_questions = _rows(attention.c_attn(asked_QSD), question_of_B)
            both_BMX = torch.cat([of_pictures, of_questions], dim=1)
            heads = both_BMX.view(*both_BMX.shape[:2], 2, -1, attention.head_dim)
            keys, values = heads.permute(2, 0, 3, 1, 4)
            cache.update(keys, values, layer)
        mask_BS = _rows(mask_QS, question_of_B)
        mask_BM = torch.cat([mask_BS.new_ones(len(mask_BS), seen_NPD.shape[1]), mask_BS], dim=1)
        nothing = seen_NPD.new_empty(*mask_BM.shape, 0)  # its keys are in the cache
        return Fused(nothing, mask_BM), EncoderDecoderCache(DynamicCache(), cache)

    # --------------------------------------------------------------------------------------------------------- answers

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
        picture_of_B: Tensor | None = None,
        question_features: Tensor | None = None,
        question_of_B: Tensor | None = None,
        encoder_outputs: Fused | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        loss_only: bool = False,
        **kwargs: Any,
    ) -> AnswerOutput:
        """Logits of an answer given its question and picture, and with labels their cross-entropy.

        The question is `input_ids` and `attention_mask`, int64 [Q, S], right-padded, or `question_features` [Q, S, F] with
        the same mask; `question_of_B`, int64 [B], is each row's question (None: row b has question b). The picture is
        `pixel_values` [N, 3, H, W] or `image_features` [N, P, F], and `picture_of_B` likewise. `decoder_input_ids` [B, T]
        is `<start> answer <end>`, right-padded; `labels` is the same with -100 at padding: it is shifted here, once.
        The loss is the mean over labelled tokens, in float32. `loss_only` reads the output matrix at labelled places alone
        and returns no logits. `encoder_outputs`, cache and `kwargs` (which are not read) are `generate`'s.
        """
        if encoder_outputs is None:
            sides = self.sides(input_ids, attention_mask, pixel_values, image_features, question_features)
            checkpointed = self.decoder.transformer.gradient_checkpointing and self.training
            if self.config.fusion == "concat" and not checkpointed:
                encoder_outputs, past_key_values = self.keys_and_values(*sides, picture_of_B, question_of_B)
            else:
                encoder_outputs = self.fused(*sides, picture_of_B, question_of_B)
        decoded = self.decoder.transformer(
            input_ids=decoder_input_ids,
            # no mask of its own: answers are padded to the right, and the decoder looks to the left
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=encoder_outputs.attention_mask,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
        )
        states_BTD: Tensor = decoded.last_hidden_state
        if labels is not None and loss_only:
            next_BT = labels[:, 1:]
            labelled = next_BT != -100
            logits_LV = self.decoder.lm_head(states_BTD[:, :-1][labelled])
            return AnswerOutput(loss=F.cross_entropy(logits_LV.float(), next_BT[labelled]))
        logits_BTV: Tensor = self.decoder.lm_head(states_BTD)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return AnswerOutput(loss=loss, logits=logits_BTV, past_key_values=decoded.past_key_values)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        picture_of_B: Tensor | None = None,
        question_features: Tensor | None = None,
        question_of_B: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Answers, int64 [B, T], without the start token, ended by the end of text and filled up with it.

        `input_ids` and `attention_mask` are the question, as in `forward`; `settings` are transformers' (`max_new_tokens`,
        `num_beams`, `do_sample`, …); with `return_dict_in_generate` its record, `sequences` as above.
        """
        sides = self.sides(input_ids, attention_mask, pixel_values, image_features, question_features)
        fused = self.fused(*sides, picture_of_B, question_of_B)
        if not settings.keys() & {"max_new_tokens", "max_length", "generation_config"}:
            settings["max_new_tokens"] = self.config.max_answer_tokens
        # padding stands behind the end of text only, where nothing is read: the end of text itself will do
        start, end = self.config.start_id, self.config.end_id
        tokens = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end}
        made = super().generate(
            encoder_outputs=fused, attention_mask=fused.attention_mask, **(tokens | settings)
        )
        if isinstance(made, Tensor):
            return made[:, 1:]
        made.sequences = made.sequences[:, 1:]
        return made


AutoConfig.register(VqaConfig.model_type, VqaConfig)
AutoModel.register(VqaConfig, VqaModel)


def _rows(values: Tensor, row_of_B: Tensor | None) -> Tensor:
    """Each row's values; None: row b has values b."""
    # its backward pass adds rows; that of plain indexing sorts them first
    return values if row_of_B is None else values.index_select(0, row_of_B)


def cross_attention_gradient_norms(model: VqaModel) -> dict[str, float]:
    """Norms of the cross-attention's gradients over all layers: `query`, `key` and `value` projections; 0 where locked.

    Read after `backward` and before the gradients are cleared. With `fusion="mean"` there is one key, whose weight is 1
    whatever the query: query and key learn nothing (the first two are 0 up to rounding).
    """
    squares = {"query": 0.0, "key": 0.0, "value": 0.0}
    for block in model.decoder.transformer.h:
        attention = block.crossattention
        if attention.q_attn.weight.grad is not None:
            squares["query"] += float(attention.q_attn.weight.grad.float().square().sum())
        if attention.c_attn.weight.grad is not None:
            key, value = attention.c_attn.weight.grad.float().chunk(
                2, dim=1
            )  # GPT-2 keeps both in one matrix
            squares["key"] += float(key.square().sum())
            squares["value"] += float(value.square().sum())
    return {name: square**0.5 for name, square in squares.items()}
