"""AnyMAL: encoders and projectors on the first pipeline stage, then the Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_anymal.data.types import MediaBatch, MicroBatch
from megatron_anymal.model.attention import DocumentPack, document_pack
from megatron_anymal.model.encoders import Encoder
from megatron_anymal.model.llama import PackedRotaryEmbedding
from megatron_anymal.model.merge import attach, merge


class AnyMALModel(MegatronModule):
    """One pipeline stage of the whole model.

    Encoders and projectors are there only where `pre_process` is true. Encoders stay in evaluation mode: they drop
    nothing at random, so a piece always gives the same features.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language_model: GPTModel,
        encoders: Mapping[str, Encoder],
        projectors: Mapping[str, MegatronModule],
        pieces_per_call: Mapping[str, int],
        vocab_size: int,
    ):
        super().__init__(config=config)
        self.language_model = language_model
        self.encoders = nn.ModuleDict(encoders)
        self.projectors = nn.ModuleDict(projectors)
        self.vocab_size = vocab_size
        self.pre_process, self.post_process = language_model.pre_process, language_model.post_process
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights
        # megatron-core's schedules ask for it.
        self.model_type = ModelType.encoder_or_decoder
        self._pieces_per_call = pieces_per_call

    def train(self, mode: bool = True) -> AnyMALModel:
        """As torch's, except for the encoders."""
        super().train(mode)
        self.encoders.eval()
        return self

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's output (called by megatron-core's schedules)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The embedding that a tied head shares (called when gradients are finalised)."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(
        self,
        micro_batch: MicroBatch,
        labels: Optional[Tensor] = None,
        soft: Optional[Mapping[str, Tensor]] = None,
    ) -> Tensor:
        """Run this stage on a micro-batch.

        Args:
            micro_batch: on this model's device; T tokens.
            labels: [1, T]; the last stage then returns losses instead of logits.
            soft: what `soft_tokens` returned before, to encode nothing again.

        Returns:
            [1, T] fp32 cross-entropy of each label, or [1, T, V / tensor-parallel size] logits on the last stage; else
            the hidden states for the next stage, [T or T / tensor-parallel size, 1, H].
        """
        pack = document_pack(micro_batch.document_lengths, micro_batch.tokens.device)
        decoder_input = None
        if self.pre_process:
            decoder_input = self.embed(micro_batch, self.soft_tokens(micro_batch) if soft is None else soft)
        return self.language_model(
            input_ids=micro_batch.tokens,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=labels if self.post_process else None,
            packed_seq_params=self._packing_for(pack),
        )

    def soft_tokens(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Encode and project a micro-batch's media.

        Returns:
            Per modality [pieces x soft tokens, H]. A modality that trains and has no media here gets those of one
            piece of zeros, which `embed` gives no place.
        """
        soft = {}
        for name, projector in self.projectors.items():
            if name in micro_batch.media:
                features = self._features(name, micro_batch.media[name])
            elif self._trains(name):
                features = self._idle_features(name, micro_batch.tokens.device)
            else:
                continue
            soft[name] = projector(features.to(self.config.params_dtype)).flatten(0, 1)
        return soft

    def embed(self, micro_batch: MicroBatch, soft: Mapping[str, Tensor]) -> Tensor:
        """The Llama's input [T, 1, H] (this rank's part of T under sequence parallelism)."""
        text = self.language_model.embedding(input_ids=micro_batch.tokens, position_ids=None)
        used = [name for name in soft if name in micro_batch.media]
        merged = merge(text, [soft[name] for name in used], [micro_batch.media[name].token_index for name in used])
        merged = attach(merged, [soft[name] for name in soft if name not in micro_batch.media])
        if torch.is_grad_enabled() and not merged.requires_grad:
            # Nothing trainable lies before the Llama: the pipeline still sends gradients backwards.
            merged.requires_grad_()
        return scatter_to_sequence_parallel_region(merged) if self.config.sequence_parallel else merged

    def _trains(self, name: str) -> bool:
        modules = (self.encoders[name], self.projectors[name])
        return any(p.requires_grad for module in modules for p in module.parameters())

    def _idle_features(self, name: str, device: torch.device) -> Tensor:
        encoder: Any = self.encoders[name]
        if any(p.requires_grad for p in encoder.parameters()):
            return encoder(torch.zeros(1, *encoder.piece_shape, device=device))
        return torch.zeros(1, encoder.feature_tokens, encoder.width, device=device)

    def _features(self, name: str, media: MediaBatch) -> Tensor:
        """A modality's features of all pieces of the micro-batch, [n, F, w]."""
        encoder: Any = self.encoders[name]
        frozen = not any(p.requires_grad for p in encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            chunks = [encoder(pieces) for pieces in media.pieces.split(self._pieces_per_call[name]) if len(pieces)]
        if not chunks:
            # The other ranks' features are of this type too, and are gathered with these.
            chunks = [media.pieces.new_zeros(0, encoder.feature_tokens, encoder.width, dtype=encoder.dtype)]
        features = torch.cat(chunks)
        return features if len(media.shares) == 1 else _gather_shares(features, media.shares)

    def _packing_for(self, pack: DocumentPack) -> PackedSeqParams:
        rotary = self.language_model.rotary_pos_emb
        if isinstance(rotary, PackedRotaryEmbedding):
            rotary.position_ids = pack.position_ids
            return pack
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=pack.cu_seqlens_q,
            cu_seqlens_kv=pack.cu_seqlens_kv,
            max_seqlen_q=pack.max_seqlen_q,
            max_seqlen_kv=pack.max_seqlen_kv,
        )


def _gather_shares(features: Tensor, shares: tuple[int, ...]) -> Tensor:
    """Put together what the tensor-parallel ranks encoded; only frozen encoders share, so no gradient flows back."""
    longest = max(shares)
    padded = features.new_zeros(longest, *features.shape[1:])
    padded[: len(features)] = features
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat([part[:share] for part, share in zip(parts, shares)])
