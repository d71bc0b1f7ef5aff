"""AnyMAL: encoders and projectors on the first pipeline stage, then the Llama.

Shapes: T tokens of a micro-batch on this rank (all of them, or a context-parallel rank's share), H the Llama's hidden
size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_anymal.config import NeftuneConfig
from megatron_anymal.data.context_parallel import held_tokens
from megatron_anymal.data.micro_batch import MediaBatch, MicroBatch
from megatron_anymal.data.shared_prompts import token_lengths, token_positions
from megatron_anymal.model.attention import DocumentPack, document_pack
from megatron_anymal.model.discrete_rows import DiscreteRows, embed_tokens
from megatron_anymal.model.embedding_merge import merge
from megatron_anymal.model.encoder_sharding import gather_features, gather_soft_tokens
from megatron_anymal.model.encoders import Encoder
from megatron_anymal.model.frozen_features import ENCODING, StoreFeatures, encode, frozen_features, store_nowhere
from megatron_anymal.model.key_value_cache import KeyValueCache
from megatron_anymal.model.lm_head import all_logits, label_losses, logits_of, whole_logits
from megatron_anymal.model.lora import LoraDropout
from megatron_anymal.model.neftune import neftune_noise
from megatron_anymal.model.output_positions import output_positions


class AnyMALModel(MegatronModule):
    """One pipeline stage of the whole model, or one virtual pipeline chunk of a stage.

    Encoders and projectors exist only if `pre_process` is true. Encoders stay in evaluation mode: without dropout, a
    piece always gives the same features.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language_model: GPTModel,
        encoders: Mapping[str, Encoder],
        projectors: Mapping[str, MegatronModule],
        pieces_per_call: Mapping[str, int],
        vocab_size: int,
        attention: str,
        neftune: NeftuneConfig,
        seed: int,
        discrete: Optional[DiscreteRows] = None,
    ):
        """Assemble the components."""
        super().__init__(config=config)
        self.language_model = language_model
        self.encoders = nn.ModuleDict(encoders)
        self.projectors = nn.ModuleDict(projectors)
        self.vocab_size = vocab_size
        # On the chunks of the embedding and the head, if the configuration has discrete media.
        self.discrete = discrete
        # Gets each micro-batch's tokens if the adapters use dropout.
        self.lora_dropout: Optional[LoraDropout] = None
        self.pre_process, self.post_process = language_model.pre_process, language_model.post_process
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights
        # Called with the features of pieces that a cache lacks.
        self.store_features: StoreFeatures = store_nowhere
        # Required by megatron-core's schedules.
        self.model_type = ModelType.encoder_or_decoder
        self._pieces_per_call = pieces_per_call
        self._attention = attention
        self._neftune, self._seed = neftune, seed
        # Until `set_trainable` is called, every micro-batch has a backward pass.
        self._llama_trains, self._trainable_modalities, self._every_pass = True, frozenset[str](), False

    def set_trainable(self, llama: bool, modalities: Collection[str], *, every_pass: bool = True) -> None:
        """Allow packs that reach nothing trainable to skip their backward pass; the same on every rank.

        Args:
            llama: whether a weight or adapter of the Llama, or a row of marks and codes, trains on any stage.
            modalities: those whose encoder or projector trains, on whichever stage they are.
            every_pass: every trainable weight must take part in every backward pass, because gradients are reduced
                while it runs.
        """
        self._llama_trains, self._trainable_modalities = llama, frozenset(modalities)
        self._every_pass = every_pass or self._scaling_is_agreed_on

    @property
    def _scaling_is_agreed_on(self) -> bool:
        """Whether FP8 scaling is delayed, so that every backward pass of every replica takes part in a reduction."""
        return bool(self.config.fp8) and self.config.fp8_recipe == "delayed"

    def train(self, mode: bool = True) -> AnyMALModel:
        """Set the mode of everything except the encoders, which stay in evaluation mode."""
        super().train(mode)
        self.encoders.eval()
        return self

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's output (called by megatron-core's schedules)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return the embedding that a tied head shares, [V / tensor-parallel size, H].

        Called when gradients are finalized.
        """
        return self.language_model.shared_embedding_or_output_weight()

    def forward(
        self,
        micro_batch: MicroBatch,
        labels: Optional[Tensor] = None,
        soft: Optional[Mapping[str, Tensor]] = None,
        cache: Optional[KeyValueCache] = None,
    ) -> Tensor:
        """Run this stage on a micro-batch.

        Args:
            micro_batch: on this model's device.
            labels: [1, T]; the last stage then returns losses instead of logits.
            soft: an earlier result of `soft_tokens`, to skip encoding.
            cache: the documents' earlier tokens, which the micro-batch continues; without gradients and context
                parallelism.

        Returns:
            On the last stage [1, T] fp32 cross-entropy (0 where the loss mask is), or [1, T, V / tensor-parallel size]
            logits (with a cache [1, R, V / tensor-parallel size], those after each document's last token), which
            `whole_logits` gathers; else the hidden states for the next stage, [T or T / tensor-parallel size, 1, H].
        """
        outputs = None if labels is None else micro_batch.label_index
        if cache is not None:
            outputs = cache.last_tokens(micro_batch.document_lengths).to(micro_batch.tokens.device)
        positions = output_positions(self.language_model, outputs, micro_batch.tokens.size(1))
        if self.lora_dropout is not None:
            self.lora_dropout.set_tokens(self._seed, micro_batch.plan.step, *_name_tokens(micro_batch), positions)
        if self.pre_process:
            stage_input = self.embed(micro_batch, self.soft_tokens(micro_batch) if soft is None else soft)
        else:
            stage_input = self.language_model.decoder.input_tensor
        if not torch.is_grad_enabled() or self._has_gradient(micro_batch):
            return self._run_llama(stage_input, micro_batch, labels, outputs, positions, cache)
        with torch.no_grad():
            output = self._run_llama(stage_input, micro_batch, labels, outputs, positions)
        return without_gradient(output, stage_input)

    def _run_llama(
        self,
        given: Tensor,
        micro_batch: MicroBatch,
        labels: Optional[Tensor],
        outputs: Optional[Tensor],
        positions: Optional[Tensor],
        cache: Optional[KeyValueCache] = None,
    ) -> Tensor:
        """Run this stage's layers and, on the last stage, the head.

        Args:
            outputs: the positions that go through the head; None: all.
            positions: the result of `output_positions` for them.
        """
        llama = self.language_model
        pack = self._packing(micro_batch, cache)
        pack.output_positions = positions
        hidden = llama.decoder(
            hidden_states=given if self.pre_process else None,
            attention_mask=None,
            packed_seq_params=pack,
        )
        if not self.post_process:
            return hidden
        if outputs is None:
            assert labels is None
            return all_logits(llama, hidden, self.vocab_size, self.discrete)
        selected = positions is not None
        if labels is None:
            rows = slice(len(outputs)) if selected else outputs
            return logits_of(llama, hidden, rows, self.vocab_size, self.discrete)[None]
        return label_losses(llama, hidden, labels, outputs, self.vocab_size, self.discrete, selected=selected)

    def whole_logits(self, local: Tensor) -> Tensor:
        """Gather the last stage's logits [..., V / tensor-parallel size] to [..., vocabulary] without padding.

        Collective over the tensor-parallel ranks.
        """
        return whole_logits(local, self.vocab_size, self.discrete)

    def _has_gradient(self, micro_batch: MicroBatch) -> bool:
        """Whether the micro-batch's loss can have a nonzero gradient; the same on every rank of the replica.

        If the Llama is frozen on every stage, all trainable weights come before it and are reached only through media.
        """
        if self._llama_trains or self._scaling_is_agreed_on:
            return True
        media = (item.modality for sample in micro_batch.plan.samples for item in sample.media)
        return any(name in self._trainable_modalities for name in media)

    def soft_tokens(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Encode and project a micro-batch's media.

        Returns:
            Per modality [pieces x soft tokens, H]. Trainable modalities are included even without pieces if their
            weights must take part in every backward pass.
        """
        device, media = micro_batch.tokens.device, micro_batch.media
        soft = {
            name: self._own_soft_tokens(name, media.get(name), device)
            for name in self.projectors
            if name in media or (self._every_pass and name in self._trainable_modalities)
        }
        # Context-parallel ranks have encoded for each other.
        shares = {n: [sum(of_rank) for of_rank in media[n].shares] for n in soft if n in media}
        shared = {name: of_ranks for name, of_ranks in shares.items() if len(of_ranks) > 1}
        if shared:
            soft.update(zip(shared, gather_soft_tokens([soft[name] for name in shared], list(shared.values()))))
        return {name: tokens.flatten(0, 1) for name, tokens in soft.items()}

    def _own_soft_tokens(self, name: str, media: Optional[MediaBatch], device: torch.device) -> Tensor:
        """Return the soft tokens of this context-parallel rank's pieces, [n, soft tokens, H]."""
        shares = media.shares if media else ((0,),)
        own = shares[parallel_state.get_context_parallel_rank() if len(shares) > 1 else 0]
        encoded, features = self._encode(name, media, device)
        if len(own) > 1 and any(own):
            features = gather_features(features, own)
        # Without pieces, a dummy piece of zeros goes through and is cut off again, so that trainable weights still take
        # part in the backward pass.
        used = features if len(features) else encoded
        soft: Tensor = self.projectors[name](used.to(self.config.params_dtype))[: len(features)]
        return soft

    def embed(self, micro_batch: MicroBatch, soft: Mapping[str, Tensor]) -> Tensor:
        """Return the Llama's input [T, 1, H] (this rank's share of T under sequence parallelism)."""
        text = self._embed_tokens(micro_batch.tokens)
        nowhere = torch.empty(0, dtype=torch.int64, device=micro_batch.tokens.device)
        tokens, positions = [], []
        for name, tensor in soft.items():
            media = micro_batch.media.get(name)
            tokens.append(tensor if media is None or media.soft_index is None else tensor[media.soft_index])
            positions.append(nowhere if media is None else media.token_index)
        merged = merge(text, tokens, positions)
        if self.training and self._neftune.alpha:
            merged = merged + self._noise(micro_batch, positions).unsqueeze(1)
        if torch.is_grad_enabled() and not merged.requires_grad:
            # Nothing before the Llama trains, but the pipeline still sends gradients backwards.
            merged.requires_grad_()
        return scatter_to_sequence_parallel_region(merged) if self.config.sequence_parallel else merged

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        if self.discrete is None:
            return self.language_model.embedding(input_ids=tokens, position_ids=None)
        return embed_tokens(self.language_model, self.discrete, tokens, self.vocab_size)

    def _noise(self, micro_batch: MicroBatch, soft_positions: Sequence[Tensor]) -> Tensor:
        """Return NEFTune's noise [T, H]; zero at the soft tokens' positions if the configuration says so."""
        documents, positions = _name_tokens(micro_batch)
        where = None
        if self._neftune.embeddings == "text":
            where = torch.ones_like(documents, dtype=torch.bool)
            where[torch.cat([*soft_positions, documents.new_empty(0)])] = False
        return neftune_noise(
            self._seed,
            micro_batch.plan.step,
            documents,
            positions,
            _own_tokens(token_lengths(micro_batch.plan), micro_batch).to(documents.device),
            self._neftune.alpha,
            self.config.hidden_size,
            self.config.params_dtype,
            where,
        )

    def _encode(self, name: str, media: Optional[MediaBatch], device: torch.device) -> tuple[Tensor, Tensor]:
        """Encode this rank's share of the pieces, unless their features are known.

        Returns:
            Features [at least 1, F, w] (of a dummy piece of zeros if there are none), and those of real pieces
            [n, F, w].
        """
        encoder: Any = self.encoders[name]
        per_call = self._pieces_per_call[name]
        timer = None if self.config.timers is None else self.config.timers(ENCODING)
        if any(p.requires_grad for p in encoder.parameters()):
            count = len(media.pieces) if media else 0
            pieces = media.pieces if media and count else torch.zeros(1, *encoder.piece_shape, device=device)
            encoded = encode(encoder, pieces, per_call, timer)
            return encoded, encoded[:count]
        if media is not None:
            features = frozen_features(name, encoder, media, per_call, self.store_features, timer)
            if len(features):
                return features, features
        dummy = torch.zeros(1, encoder.feature_tokens, encoder.width, dtype=encoder.dtype, device=device)
        return dummy, dummy[:0]

    def _packing(self, micro_batch: MicroBatch, cache: Optional[KeyValueCache] = None) -> DocumentPack:
        lengths, device = micro_batch.document_lengths, micro_batch.tokens.device
        if cache is not None:
            return cache.pack(lengths, device, self.language_model.inv_freq, self._attention)
        return document_pack(
            lengths,
            device,
            self.language_model.inv_freq,
            self._attention,
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_world_size(),
            micro_batch.prompts,
        )


def _name_tokens(micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Identify tokens independently of the layout, as keys for random numbers.

    Returns:
        [T] int64 each: the token's document in the global batch (twice the sample's position, plus 1 for a pair's
        rejected answer, while a shared prompt belongs to the chosen one; -1 for padding), and its position in the
        document.
    """
    owners, branch = micro_batch.sample_positions[0], micro_batch.branch
    documents = 2 * owners if branch is None else 2 * owners + branch[0]
    positions = token_positions(micro_batch.document_lengths, micro_batch.prompts)
    return documents.where(owners >= 0, -1), _own_tokens(positions, micro_batch).to(owners.device)


def _own_tokens(whole: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Select this rank's tokens of a pack's [T over all context-parallel ranks]."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return whole
    return whole[held_tokens(micro_batch.document_lengths, parallel_state.get_context_parallel_rank(), size)]


def without_gradient(output: Tensor, given: Tensor) -> Tensor:
    """Return a stage's output, with a backward pass that just passes a zero gradient to the stage's input.

    Earlier stages still take part: pipelines send gradients backwards in any case, and gradient buckets become ready in
    the same order on every rank.

    Args:
        output: of any shape, computed from `given` without a graph.
        given: the stage's input, of any shape.

    Returns:
        The shape of `output`.
    """
    return _ZeroGradient.apply(output, given)


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, given: Tensor) -> Tensor:
        ctx.given = given.shape, given.dtype, given.device
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        shape, dtype, device = ctx.given
        return None, torch.zeros(shape, dtype=dtype, device=device)
