"""Sequence packing: document boundaries, rotary position embeddings (RoPE), and block-diagonal causal attention.

Positions restart with each document; the angles are computed once per pass, and every layer's core attention rotates
its queries and keys by them, whichever kernel follows.

Under context parallelism each rank has the queries of its own tokens, and the keys and values of the whole pack are
gathered (the backward pass sums and scatters their gradients). No pack-sized mask is ever materialized: see
attention_kernels.py.

Shapes: T tokens of a pack, Q = T / context-parallel size of them on this rank, n heads, g key/value groups, d head
size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_anymal.data.context_parallel import held_tokens
from megatron_anymal.data.records import PackedPrompt
from megatron_anymal.data.shared_prompts import NO_PROMPTS, token_positions
from megatron_anymal.model.attention_kernels import KERNELS, Attend, PackedDocuments
from megatron_anymal.model.compiled_ops import apply_rotary


class Rotation(NamedTuple):
    """RoPE rotation of a rank's tokens: [Q, 1, d] each, fp32, the second half of d repeating the first."""

    # Cosines, [Q, 1, d].
    cos: Tensor
    # Sines, [Q, 1, d].
    sin: Tensor


def rotation(position_ids: Tensor, inv_freq: Tensor) -> Rotation:
    """Compute the rotation of tokens from their positions in their documents.

    Args:
        position_ids: [Q] int64.
        inv_freq: [d / 2], from transformers' LlamaRotaryEmbedding (including RoPE scaling).
    """
    angles = torch.outer(position_ids.to(inv_freq.dtype), inv_freq.to(position_ids.device))
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return Rotation(angles.cos(), angles.sin())


@dataclass
class DocumentPack(PackedSeqParams):
    """Layout of a pack's documents, passed through megatron-core's layers in place of its own PackedSeqParams.

    Without Transformer Engine `qkv_format` stays "sbhd": the pack is one sequence for everything except the core
    attention, which reads the fields below.
    """

    # Rotation of this rank's queries and keys.
    rotation: Optional[Rotation] = None
    # Attention within these documents; None if Transformer Engine computes it.
    kernel: Optional[Attend] = None
    # [T] int64: index of each token of the pack among the gathered ones; None without context parallelism.
    from_gathered: Optional[Tensor] = None
    # [R] int64: positions at which the Llama's last layer computes its output (output_positions.py); None: all of them.
    output_positions: Optional[Tensor] = None


def document_pack(
    lengths: Sequence[int],
    device: torch.device,
    inv_freq: Tensor,
    kernel: str = "sdpa",
    context_rank: int = 0,
    context_size: int = 1,
    prompts: Mapping[int, PackedPrompt] = NO_PROMPTS,
) -> DocumentPack:
    """Describe a pack of documents with these lengths, in order; no document is empty.

    Args:
        inv_freq: [d / 2], see `rotation`.
        kernel: a key of `attention_kernels.KERNELS`, or "transformer_engine", whose attention splits documents over
            context-parallel ranks itself and does not support prompts.
        prompts: `MicroBatch.prompts`: the documents, by their position, that continue a prompt within the pack.

    Raises:
        DataError: a document is not padded for this many context-parallel ranks.
    """
    positions = token_positions(lengths, prompts)
    from_gathered = None
    if context_size > 1:
        gathered = torch.cat([held_tokens(lengths, rank, context_size) for rank in range(context_size)])
        from_gathered = torch.empty_like(gathered)
        from_gathered[gathered] = torch.arange(len(gathered))
        positions = positions[held_tokens(lengths, context_rank, context_size)]
    rotated = rotation(positions.to(device), inv_freq)
    if kernel == "transformer_engine":
        assert not prompts, "shares_prompts excludes Transformer Engine's attention"
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        return DocumentPack(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            rotation=rotated,
        )
    return DocumentPack(
        qkv_format="sbhd",
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        rotation=rotated,
        kernel=KERNELS[kernel](PackedDocuments(lengths, context_rank, context_size, prompts), device),
        from_gathered=None if from_gathered is None else from_gathered.to(device),
    )


class PackedAttention(MegatronModule):
    """megatron-core's core attention for packed documents."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: Optional[float] = None, **ignored: Any
    ):
        # megatron-core passes the same arguments to every core attention; masks and dropout do not apply here.
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Optional[Tensor],
        packed_seq_params: Optional[DocumentPack] = None,
        **ignored: Any,
    ) -> Tensor:
        """Attend within documents.

        Args:
            query: [Q, 1, n, d].
            key: [Q, 1, g, d].
            value: [Q, 1, g, d].
            attention_mask: unused.

        Returns:
            [Q, 1, n * d].
        """
        pack = packed_seq_params
        assert pack is not None and pack.kernel is not None and pack.rotation is not None
        query, key = apply_rotary(query.squeeze(1), key.squeeze(1), *pack.rotation)
        value = value.squeeze(1)
        if pack.from_gathered is not None:
            key, value = _gather_keys(key, value, pack.from_gathered)
        return pack.kernel(query, key, value, self.scale).flatten(1).unsqueeze(1)


def _gather_keys(key: Tensor, value: Tensor, from_gathered: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the whole pack's keys and values, in pack order, from [Q, g, d] of every context-parallel rank."""
    both = torch.cat([key, value], dim=-1)
    everything = gather_from_sequence_parallel_region(both, group=parallel_state.get_context_parallel_group())
    key, value = everything[from_gathered].chunk(2, dim=-1)
    return key, value
