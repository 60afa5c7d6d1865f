"""The multimodal LLM: picture tower, projector, causal language model; one saved folder that `from_pretrained` loads.

R rows  L columns  N distinct pictures  K blocks of placeholders  P tokens of a picture  V vocabulary
F width of the tower  D width of the words
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from fmray.config.schema import ImageConfig
from fmray.errors import ConfigError, DataError
from fmray.models.answering import AnswerOutput
from fmray.models.gated_attention import GatedLayers, Memory
from fmray.models.output_side import OutputSide
from fmray.models.packing import IGNORE, visible
from fmray.models.preparation import normalized_pixels
from fmray.models.projectors import ProjectorKind, make_projector, projected_tokens
from fmray.models.towers import (
    fold_batch_norm,
    hold_batch_norm,
    is_convolutional,
    new_tower,
    sub_config,
    tower_width,
)


class MllmConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """What a saved multimodal LLM is made of, and how it is talked to."""

    model_type = "fmray_mllm"
    # transformers finds vocabulary and layers of a model that generates under the name text_config
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (transformers' contract)

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        vision_layer: int = -1,
        grid: tuple[int, int] | list[int] = (14, 14),
        projector: ProjectorKind = "mlp",
        shuffle: int = 2,
        fusion: Literal["concat", "cross_attention"] = "concat",
        cross_attention_every: int = 4,
        image_token_id: int | None = None,
        hold_batch_norm: bool = True,
        folded_batch_norm: bool = False,
        template: Literal["chat", "plain"] = "chat",
        max_tokens: int = 512,
        max_answer_tokens: int = 64,
        row_tokens: int | None = None,
        output: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        self.vision_config = sub_config(vision_config, "vit")
        self.text_config = sub_config(text_config, "gpt2")
        self.image = image or ImageConfig().model_dump(mode="json")
        self.vision_layer = vision_layer
        self.grid = list(grid)
        self.projector, self.shuffle = projector, shuffle
        self.fusion, self.cross_attention_every = fusion, cross_attention_every
        # behind the vocabulary: never looked up, so that no embedding needs to be added
        self.image_token_id = self.text_config.vocab_size if image_token_id is None else image_token_id
        self.hold_batch_norm, self.folded_batch_norm = hold_batch_norm, folded_batch_norm
        self.template = template
        self.max_tokens, self.max_answer_tokens = max_tokens, max_answer_tokens
        self.row_tokens = row_tokens
        self.output = output
        rest["tie_word_embeddings"] = False  # the language model ties its own
        super().__init__(**rest)

    @property
    def picture_tokens(self) -> int:
        """P: the language model's tokens of one picture."""
        return projected_tokens(self.projector, (self.grid[0], self.grid[1]), self.shuffle)


class Mllm(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is untyped here
    """Reads pictures among words, says words. Parts: vision, projector, language and, where asked for, cross_attention, output.

    `fusion="concat"`: projected pictures take the places of placeholders (LLaVA, Liu et al. 2023, equation 1). With
    `"cross_attention"` gated layers between the blocks read them (Flamingo, Alayrac et al. 2022, §2.2).
    """

    config_class = MllmConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(
        self,
        config: MllmConfig,
        vision: PreTrainedModel | None = None,
        language: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.vision = vision if vision is not None else new_tower(config.vision_config)
        if config.folded_batch_norm:
            fold_batch_norm(self.vision)
        self._memory_format = torch.contiguous_format
        if is_convolutional(config.vision_config):
            self._memory_format = torch.channels_last
            self.vision.to(memory_format=self._memory_format)
        if language is None:
            language = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.float32)
        self.language = language
        width, grid = language.get_input_embeddings().embedding_dim, (config.grid[0], config.grid[1])
        self.projector = make_projector(
            config.projector, tower_width(config.vision_config), width, grid, config.shuffle
        )
        self.cross_attention: GatedLayers | None = None
        if config.fusion == "cross_attention":
            self.cross_attention = GatedLayers(self.language, config.cross_attention_every)
        self.output = None if config.output is None else OutputSide(width, config.output)
        self.image = ImageConfig.model_validate(config.image)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Only our own layers: tower and language model come initialised by their own classes."""
        if isinstance(module, nn.Linear) and any(module is own for own in self.projector.modules()):
            # the scale of torch's own start, LLaVA's: pictures begin near the words' size, not far above it
            nn.init.normal_(module.weight, std=(3 * module.in_features) ** -0.5)
            nn.init.zeros_(module.bias)
        if self.cross_attention is not None:
            self.cross_attention.initialise(module)

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.language.get_input_embeddings()
        return table

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.language.get_output_embeddings()
        return head

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """For transformers' `generate`: pictures are read with the prompt. Raises ConfigError where gated layers need them."""
        if self.cross_attention is not None and kwargs.get("pixel_values") is not None:
            cure = "generate() knows no places of pictures beside the words: ask MllmAnswering.answer"
            raise ConfigError("fusion", "cross_attention", cure)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if not kwargs.get("is_first_iteration", False):
            for name in ("pixel_values", "image_features", "picture_valid", "pictures"):
                inputs.pop(name, None)
        return inputs

    def train(self, mode: bool = True) -> Mllm:
        super().train(mode)
        for part in self.children():
            # what does not learn has no dropout either
            if mode and not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        if self.config.hold_batch_norm:
            hold_batch_norm(self)
        return self

    # ------------------------------------------------------------------------------------------------------------- pictures

    def picture_features(self, pixels_NCHW: Tensor) -> Tensor:
        """The tower's tokens, [N, h·w, F]: of a layer's patches without class token, or of a feature map; uint8 pixels in."""
        deep = self.config.vision_layer != -1
        prepared = normalized_pixels(pixels_NCHW, self.image).contiguous(memory_format=self._memory_format)
        outputs = self.vision(pixel_values=prepared, **({"output_hidden_states": True} if deep else {}))
        tokens = outputs.hidden_states[self.config.vision_layer] if deep else outputs.last_hidden_state
        if tokens.dim() == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        tokens = tokens[:, tokens.shape[1] - self.config.grid[0] * self.config.grid[1] :]
        if torch.is_grad_enabled():
            # what the tower computes for others gets a gradient of zero: no parameter is left without one
            unread = [outputs.last_hidden_state, outputs.get("pooler_output")]
            tokens = tokens + sum(0.0 * other.sum() for other in unread if other is not None)
        features_NPF: Tensor = tokens
        return features_NPF

    def projected(
        self, pixels_NCHW: Tensor | None = None, features_NPF: Tensor | None = None
    ) -> Tensor | None:
        """Pictures, or what the tower made of them, as the language model's tokens, [N, P, D]; None where there are none."""
        if features_NPF is None:
            if pixels_NCHW is None:
                return None
            features_NPF = self.picture_features(pixels_NCHW)
        grid = self.config.grid
        if features_NPF.shape[1] != grid[0] * grid[1]:
            made = f"features of {features_NPF.shape[1]} tokens a picture"
            raise DataError(f"pictures: {made}, but the model's tower makes {grid[0]} x {grid[1]}")
        tokens: Tensor = self.projector(features_NPF.to(self.projector_dtype))
        return tokens

    @property
    def projector_dtype(self) -> torch.dtype:
        """float32, unless somebody converted the model."""
        return next(self.projector.parameters()).dtype

    # ------------------------------------------------------------------------------------------------------- words and pictures

    def prompt_words(self, ids_RL: Tensor, blocks_KPD: Tensor | None) -> Tensor:
        """Embeddings of the words, pictures in the placeholders' places in reading order, [R, L, D].

        Raises DataError where placeholders and picture tokens differ in number.
        """
        is_picture_RL = ids_RL == self.config.image_token_id
        outside_RL = is_picture_RL | (ids_RL >= self.config.text_config.vocab_size)
        words_RLD: Tensor = self.get_input_embeddings()(ids_RL.masked_fill(outside_RL, 0))
        if self.output is not None:
            words_RLD = self.output.put(words_RLD, ids_RL)
        places = int(is_picture_RL.sum())
        tokens = 0 if blocks_KPD is None else blocks_KPD.shape[0] * blocks_KPD.shape[1]
        if places != tokens:
            raise DataError(
                f"pictures: {places} placeholders in the rows, but {tokens} tokens of pictures to put there"
            )
        if blocks_KPD is None or not places:
            return words_RLD
        return words_RLD.masked_scatter(is_picture_RL.unsqueeze(-1), blocks_KPD.to(words_RLD.dtype))

    def _embedded(
        self, ids_RL: Tensor, projected_NPD: Tensor | None, valid_N: Tensor | None, pictures_K: Tensor | None
    ) -> Tensor:
        """As `prompt_words`; a batch without pictures still holds on to the projector, by zero times its output."""
        blocks = None
        if projected_NPD is not None and self.cross_attention is None:
            if pictures_K is None:
                kept = torch.ones(len(projected_NPD), dtype=torch.bool) if valid_N is None else valid_N
                pictures_K = kept.nonzero().squeeze(1).to(projected_NPD.device)
            blocks = projected_NPD[pictures_K] if len(pictures_K) else None
        words_RLD = self.prompt_words(ids_RL, blocks)
        if projected_NPD is not None and blocks is None:
            words_RLD = words_RLD + 0.0 * projected_NPD.sum().to(words_RLD.dtype)
        return words_RLD

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        memory_tokens: Tensor | None = None,
        memory_visible: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        before: Tensor | None = None,
        logits_to_keep: int = 0,
        loss_only: bool = False,
        reply_embeds: Tensor | None = None,
        **pictures: Any,
    ) -> AnswerOutput:
        """Logits [R, L, V] (of the last `logits_to_keep` columns; 0: all) and with labels their loss, with `loss_only` it alone.

        labels: int64 [R, L], unshifted, -100 where there is none; each is predicted from the column before it, or from the one
        that `before` [R, L] names. reply_embeds: float [K, 2, D], what the pictures that answer should show, as words and as
        pictures (`output_side.reply_loss`). The other arguments are those of `body`. Raises DataError where no label is given.
        """
        memory = None
        if memory_tokens is not None and memory_visible is not None:
            memory = Memory(memory_tokens, memory_visible)
        body = self.body(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            memory,
            pixel_values=pixel_values,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            deep=reply_embeds is not None and self.output is not None and self.output.deep,
            **pictures,
        )
        states_RLD = body.last_hidden_state
        loss = reply_loss = None
        if labels is not None:
            # only these tokens' logits: the output matrix is the largest of a small language model
            states_TD, targets_T, _ = predictions(states_RLD, labels, before)
            loss = F.cross_entropy(self.said_next(states_TD).float(), targets_T)
            if self.output is not None and reply_embeds is not None and input_ids is not None:
                reply_loss = self.output.loss(self.output.states(body), input_ids, reply_embeds)
                loss = loss + reply_loss
            if loss_only:
                return AnswerOutput(loss=loss, reply_loss=reply_loss)
        logits = self.said_next(states_RLD[:, -logits_to_keep:])
        cache = body.past_key_values
        return AnswerOutput(loss=loss, logits=logits, past_key_values=cache, reply_loss=reply_loss)

    def said_next(self, states_NF: Tensor) -> Tensor:
        """Logits of the token behind some states, [..., V]: the output matrix's, the decision for a picture its own."""
        logits_NV: Tensor = self.get_output_embeddings()(states_NF)
        return logits_NV if self.output is None else self.output.decided(logits_NV, states_NF)

    def body(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        memory: Memory | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        picture_valid: Tensor | None = None,
        pictures: Tensor | None = None,
        group: Tensor | None = None,
        branch: Tensor | None = None,
        memory_pictures: Tensor | None = None,
        memory_group: Tensor | None = None,
        memory_place: Tensor | None = None,
        seen: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        deep: bool = False,
        **_: Any,
    ) -> Any:
        """The language model's output without its head, `last_hidden_state` float [R, L, D].

        input_ids: int64 [R, L]. attention_mask: int64 [R, L], or bool [R, 1, L, L] as `packing.visible`; group and branch
        [R, L] say it for packed rows. pixel_values: uint8 [N, 3, S, S], or image_features [N, h·w, F]. picture_valid: bool
        [N], False at a picture that only keeps the tower busy. pictures: int64 [K], the picture of each block of
        placeholders; without it the valid ones, in order. memory_… and seen: as `Packed` has them, for cross-attention.
        deep: with the states of every layer. Raises DataError where placeholders and picture tokens differ in number.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "input_ids or inputs_embeds"
            projected = self.projected(pixel_values, image_features)
            inputs_embeds = self._embedded(input_ids, projected, picture_valid, pictures)
            if self.cross_attention is not None and projected is not None:
                memory = Memory.of_pictures(
                    projected, memory_pictures, memory_group, memory_place, group, seen, inputs_embeds.shape
                )
        more: dict[str, Any] = {"past_key_values": past_key_values, "use_cache": use_cache}
        if deep:
            more["output_hidden_states"] = True
        if self.cross_attention is not None and memory is not None:
            # gated layers find it among the arguments of the blocks
            visible_RLM = memory.visible_RLM[:, -inputs_embeds.shape[1] :]
            more["picture_memory"] = Memory(memory.tokens_RMD, visible_RLM)
        if position_ids is None:
            position_ids = _positions(attention_mask, inputs_embeds.shape[1])
        mask = self._mask(attention_mask, group, branch, inputs_embeds.dtype)
        return self.language.base_model(
            inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position_ids, **more
        )

    def _mask(
        self, mask: Tensor | None, group: Tensor | None, branch: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        if group is not None and branch is not None:
            mask = visible(group, branch)
        if mask is None or mask.dim() < 4 or self.language.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _positions(mask: Tensor | None, length: int) -> Tensor | None:
    """Real tokens counted, wherever the padding is; None: as they stand."""
    if mask is None or mask.dim() != 2:
        return None
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]


def predictions(
    states_RLD: Tensor, labels_RL: Tensor, before_RL: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """States that a label is predicted from [T, D], the labels [T], and their rows and columns; here labels are shifted, once.

    Raises DataError where there is none.
    """
    rows_T, columns_T = (labels_RL != IGNORE).nonzero(as_tuple=True)
    from_T = columns_T - 1 if before_RL is None else before_RL[rows_T, columns_T]
    real = from_T >= 0
    rows_T, columns_T, from_T = rows_T[real], columns_T[real], from_T[real]
    if not len(rows_T):
        raise DataError("labels: no token to learn in the whole batch")
    return states_RLD[rows_T, from_T], labels_RL[rows_T, columns_T], (rows_T, columns_T)


AutoConfig.register(MllmConfig.model_type, MllmConfig)
AutoModel.register(MllmConfig, Mllm)
