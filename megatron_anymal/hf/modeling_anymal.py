"""AnyMAL for transformers: frozen encoders, projectors, and transformers' own Llama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaForCausalLM, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatron_anymal.data.code_grammar import CodeGrammar
from megatron_anymal.data.codes import CodeLayout
from megatron_anymal.data.discrete_vocabulary import TEXT
from megatron_anymal.hf.code_processor import CodeLogitsProcessor
from megatron_anymal.hf.configuration_anymal import AnyMALConfig, modality_config
from megatron_anymal.hf.projectors import build_projector
from megatron_anymal.modalities import build_modality
from megatron_anymal.model.embedding_merge import merge
from megatron_anymal.model.encoders import ENCODERS, build_encoder

# By encoder.type: substrings of weight names in transformers 5 -> in transformers 4.
_NAMES_IN_4 = {
    "dinov2": {
        ".attention.q_proj.": ".attention.attention.query.",
        ".attention.k_proj.": ".attention.attention.key.",
        ".attention.v_proj.": ".attention.attention.value.",
        ".attention.o_proj.": ".attention.output.dense.",
    },
    "videomae": {".attention.query.bias": ".attention.q_bias", ".attention.value.bias": ".attention.v_bias"},
}


class AnyMALForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """An AnyMAL model that answers prompts of text and media.

    Media are passed as `media`: name of a modality -> pieces [n, *piece_shape] of the whole batch, in the order of
    their placeholders, row by row. AnyMALProcessor creates them.

    Raises:
        ConfigError: a modality, encoder or projector of the configuration is unknown or invalid.
    """

    config_class = AnyMALConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Classes whose modules must be on one device.
    _no_split_modules = [  # noqa: RUF012  (transformers declares it)
        "LlamaDecoderLayer",
        "PerceiverResampler",
        "LinearProjector",
        *(encoder.__name__ for encoder in ENCODERS.values()),
    ]
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: AnyMALConfig):
        super().__init__(config)
        sections = {name: modality_config(section) for name, section in config.modalities.items()}
        self._tokens = {name: section.projector.num_tokens for name, section in sections.items()}
        self._pieces_per_call = {name: section.encoder.max_pieces_per_call for name, section in sections.items()}
        self._placeholders = {name: section["placeholder_id"] for name, section in config.modalities.items()}
        self._grammar = CodeGrammar(CodeLayout.of_export(config.discrete)) if config.discrete else None
        encoders, projectors = {}, {}
        for name, section in sections.items():
            shape = build_modality(name, section).piece_shape
            # transformers creates its own encoders in float32, regardless of the dtype of the whole model.
            encoder = build_encoder(section.encoder, shape).to(torch.get_default_dtype())
            encoders[name] = encoder
            projectors[name] = build_projector(
                section.projector, encoder.feature_tokens, encoder.width, config.text_config.hidden_size
            )
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False)
        self.projectors = nn.ModuleDict(projectors)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    def train(self, mode: bool = True) -> AnyMALForConditionalGeneration:
        """Like `nn.Module.train`, but the encoders stay in evaluation mode."""
        super().train(mode)
        self.encoders.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The Llama's embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the Llama's embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The Llama's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the Llama's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self, *arguments: Any, **kwargs: Any) -> nn.Module:
        """The Llama without its head."""
        return self.language_model.model

    def encode_media(self, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode pieces into soft tokens.

        Args:
            media: name -> [n, *piece_shape] of any floating dtype.

        Returns:
            Name -> [n x soft tokens per piece, H].

        Raises:
            ValueError: an unknown modality, or pieces whose shape does not match its encoder.
        """
        return {name: self._encode(name, pieces) for name, pieces in media.items()}

    def _encode(self, name: str, pieces: Tensor) -> Tensor:
        if name not in self._tokens:
            known = ", ".join(sorted(self._tokens)) or "none"
            raise ValueError(f"media[{name!r}]: this model has no such modality; it has: {known}.")
        encoder: Any = self.encoders[name]
        projector: Any = self.projectors[name]
        if tuple(pieces.shape[1:]) != encoder.piece_shape:
            raise ValueError(
                f"media[{name!r}] has shape {list(pieces.shape)}; the encoder takes [n, "
                f"{', '.join(map(str, encoder.piece_shape))}]. Prepare media with this model's processor."
            )
        with torch.no_grad():
            features = torch.cat([encoder(call) for call in pieces.split(self._pieces_per_call[name])])
        return projector(features.to(projector.gain.dtype)).flatten(0, 1)

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        inputs_embeds: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: Union[int, Tensor] = 0,
        media: Optional[Mapping[str, Tensor]] = None,
        soft_tokens: Optional[Mapping[str, Tensor]] = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run LlamaForCausalLM with media at the placeholders of `input_ids`.

        Args:
            input_ids: [B, T] int64; or `inputs_embeds` instead.
            attention_mask: [B, T], with a cache [B, cached + T]: 0 for padding. None: no padding.
            position_ids: [B, T] int64. None: transformers counts them.
            inputs_embeds: [B, T, H].
            labels: [B, T] int64, aligned with `input_ids` (the loss shifts them); -100 is ignored.
            logits_to_keep: compute logits only for the last so many positions (0: all), or for these, [k] int64.
            media: name -> [n, *piece_shape], pieces of the whole batch in the order of their placeholders, row by row.
            soft_tokens: the result of `encode_media`, instead of `media`.
            kwargs: passed to the Llama, including its cache, whose name depends on the version of transformers.

        Raises:
            ValueError: the numbers of placeholders and soft tokens differ, an unknown modality, or a wrong shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            assert input_ids is not None
            soft = self.encode_media(media) if media else soft_tokens
            inputs_embeds = self._embed(input_ids, soft or {})
        elif media or soft_tokens:
            raise ValueError("Media replace the placeholders of input_ids, which inputs_embeds do not have.")
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _embed(self, input_ids: Tensor, soft_tokens: Mapping[str, Tensor]) -> Tensor:
        """[B, T] ids and soft tokens -> embeddings [B, T, H]."""
        text = self.get_input_embeddings()(input_ids)
        if not soft_tokens and not self._holds_placeholders(input_ids):
            return text
        ids, positions = input_ids.flatten(), []
        for name in self._placeholders:
            positions.append((ids == self._placeholders[name]).nonzero().flatten())
            count = len(soft_tokens.get(name, ()))
            if count != len(positions[-1]):
                each = self._tokens[name]
                raise ValueError(
                    f"input_ids have {len(positions[-1])} placeholders of {name} but media[{name!r}] gives {count} "
                    f"soft tokens ({count // each} pieces of {each}). Pass ids and media from the same processor call."
                )
        used = [soft_tokens[name].to(text.device) for name in self._placeholders if name in soft_tokens]
        used_positions = [index for name, index in zip(self._placeholders, positions) if name in soft_tokens]
        return merge(text.flatten(0, 1).unsqueeze(1), used, used_positions).view_as(text)

    def _holds_placeholders(self, input_ids: Tensor) -> bool:
        if not self._placeholders:
            return False
        placeholders = torch.tensor(list(self._placeholders.values()), device=input_ids.device)
        return bool(torch.isin(input_ids, placeholders).any())

    @torch.no_grad()
    def generate(self, *arguments: Any, modalities: Optional[Sequence[str]] = None, **kwargs: Any) -> Any:
        """Generate as transformers does. Media as codes obey their grammar: after a begin mark come codes of that kind
        of media only, as many as an item has, and then its end mark.

        Args:
            arguments: of transformers' `generate`.
            modalities: what an answer may consist of: "text" and names of the configuration's `discrete`; without
                "text", it has at least one item. None: text and all of them.
            kwargs: of transformers' `generate`, and `media`.

        Raises:
            ValueError: the model does not write a modality, a prompt ends within an item, or there is no room for an
                item.
        """
        if self._grammar is None:
            if modalities not in (None, [TEXT], (TEXT,)):
                raise ValueError(f"modalities={list(modalities)}: this model writes text only.")
            return super().generate(*arguments, **kwargs)
        prompts = kwargs.get("input_ids", kwargs.get("inputs", arguments[0] if arguments else None))
        for row, tokens in enumerate([] if prompts is None else prompts.tolist()):
            if item := self._grammar.open_item(tokens):
                raise ValueError(
                    f"Row {row} of input_ids ends within an item of {item.name!r}, after {item.codes} code(s). Close "
                    "it with its end mark, or name modalities and let the model begin the item."
                )
        names = self._grammar.layout.vocabulary.names
        processor = CodeLogitsProcessor(self._grammar, [TEXT, *names] if modalities is None else modalities)
        others = kwargs.pop("logits_processor", None) or ()
        return super().generate(*arguments, logits_processor=LogitsProcessorList([processor, *others]), **kwargs)

    def _get_logits_processor(self, generation_config: Any, input_ids_seq_length: Any = None, **kwargs: Any) -> Any:
        # Here the length of the answers is known.
        for processor in kwargs.get("logits_processor") or ():
            if isinstance(processor, CodeLogitsProcessor):
                ends = generation_config.eos_token_id or []
                ends = [ends] if isinstance(ends, int) else ends
                processor.prepare(ends, input_ids_seq_length, generation_config.max_length)
        return super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Optional[Tensor] = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        # Encode media once, then repeat the soft tokens along with their rows.
        media = model_kwargs.pop("media", None)
        soft = self.encode_media(media) if media else model_kwargs.pop("soft_tokens", None)
        if soft and expand_size > 1 and input_ids is not None:
            soft = {name: self._repeat(name, tokens, input_ids, expand_size) for name, tokens in soft.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "soft_tokens": soft} if soft else model_kwargs

    def _repeat(self, name: str, tokens: Tensor, input_ids: Tensor, times: int) -> Tensor:
        """Repeat soft tokens [k, H] along with the rows of `input_ids`."""
        counts = (input_ids == self._placeholders[name]).sum(dim=1).tolist()
        if sum(counts) != len(tokens):
            # The first forward pass raises the error.
            return tokens
        return torch.cat([row.repeat(times, 1) for row in tokens.split(counts)])

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *arguments: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *arguments, **kwargs)
        # The keys and values of the prompt are cached: the next step embeds only new tokens.
        if updated.get("use_cache", True):
            updated.pop("soft_tokens", None)
        return updated

    def _fix_state_dict_key_on_load(self, key: str) -> tuple[str, bool]:
        """Convert a weight's name in a file to its name in transformers 4; transformers 5 does not call this."""
        name = key.split(".")[1] if key.startswith("encoders.") else ""
        kind = self.config.modalities[name]["encoder"]["type"] if name in self.config.modalities else ""
        for in_5, in_4 in _NAMES_IN_4.get(kind, {}).items():
            if in_5 in key:
                return key.replace(in_5, in_4), True
        return super()._fix_state_dict_key_on_load(key)
