"""Transformer Engine's layers for the Llama; imported where Transformer Engine can run.

megatron-core's specification (norm and linear in one, fused attention) with one change: the rotary embedding is ours,
one kernel for the whole pack, where megatron-core's loops over the documents in every layer.
"""

from __future__ import annotations

from typing import Any, Optional

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_anymal.model.attention import DocumentPack
from megatron_anymal.model.fusions import turn


def layer_spec() -> ModuleSpec:
    """A Llama's layer of Transformer Engine's modules."""
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = TurnedAttention
    return spec


class TurnedAttention(TEDotProductAttention):
    """Transformer Engine's attention within packed documents ("thd"), which also splits them over context-parallel
    ranks, on turned queries and keys."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Optional[Tensor],
        attn_mask_type: Any,
        attention_bias: Optional[Tensor] = None,
        packed_seq_params: Optional[DocumentPack] = None,
        **more: Any,
    ) -> Tensor:
        """query [Q, n, d], key and value [Q, g, d] of this rank's tokens -> [Q, n * d]."""
        assert packed_seq_params is not None and packed_seq_params.rotation is not None
        query, key = turn(query, key, *packed_seq_params.rotation)
        return super().forward(
            query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params, **more
        )
