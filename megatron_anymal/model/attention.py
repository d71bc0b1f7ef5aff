"""Block-diagonal causal attention over packed documents, where Transformer Engine is not.

No T x T mask is ever made: documents of similar length are gathered into a batch, padded at their end, and go through
torch's scaled dot-product attention with `is_causal`, which never lets a document's tokens see the padding behind
them. On a GPU that is torch's flash kernel.

Shapes: T tokens of a pack, n heads, g key/value groups, d head size, D documents of a bucket, L its padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass
class DocumentPack(PackedSeqParams):
    """Where a pack's documents lie. It rides through megatron-core's layers in the place of its own class.

    `qkv_format` stays "sbhd": the pack is one sequence for everything except the core attention and the rotary
    embedding, which read the fields below.
    """

    # [T] int64: the token's place in its document.
    position_ids: Optional[Tensor] = None
    # Per bucket, [D, L] int64: the pack's token at each place (the document's last one repeated behind its end).
    buckets: tuple[Tensor, ...] = ()
    # [T] int64: where each token of the pack lies in the buckets laid end to end.
    from_buckets: Optional[Tensor] = None


def document_pack(lengths: Sequence[int], device: torch.device) -> DocumentPack:
    """Describe a pack whose documents have these lengths, in order; none is empty."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    by_size: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        by_size.setdefault((length - 1).bit_length(), []).append(number)
    buckets, from_buckets, offset = [], torch.empty(int(starts[-1]), dtype=torch.int64), 0
    for numbers in by_size.values():
        sizes = torch.tensor([lengths[n] for n in numbers])
        first, width = starts[numbers], int(sizes.max())
        place = torch.arange(width).expand(len(numbers), width)
        bucket = first[:, None] + torch.minimum(place, sizes[:, None] - 1)
        real = place < sizes[:, None]
        from_buckets[bucket[real]] = offset + real.flatten().nonzero().flatten()
        buckets.append(bucket.to(device))
        offset += bucket.numel()
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = starts.to(torch.int32).to(device)
    longest = max(lengths)
    return DocumentPack(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        position_ids=position_ids.to(device),
        buckets=tuple(buckets),
        from_buckets=from_buckets.to(device),
    )


class PackedAttention(MegatronModule):
    """megatron-core's core attention for packed documents."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: Optional[float] = None, **ignored: Any
    ):
        # megatron-core hands every core attention the same arguments; masks and dropout do not apply here.
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
            query: [T, 1, n, d]; key, value: [T, 1, g, d].

        Returns:
            [T, 1, n * d].
        """
        assert packed_seq_params is not None and packed_seq_params.from_buckets is not None
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        grouped = query.size(1) != key.size(1)
        outputs = []
        for bucket in packed_seq_params.buckets:
            q, k, v = (x[bucket].transpose(1, 2) for x in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return out[packed_seq_params.from_buckets].flatten(1).unsqueeze(1)
