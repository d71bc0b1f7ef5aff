"""Transformer Engine modules for the Llama and the projectors; imported only if Transformer Engine can run.

The Llama's layers follow megatron-core's specification (fused norm and linear, fused attention) with one change: the
rotary embedding is our own single kernel for the whole pack, whereas megatron-core's loops over the documents in every
layer.
"""

from __future__ import annotations

import os
from typing import Any, Optional

from megatron.core.extensions.transformer_engine import TEDotProductAttention, TELayerNormColumnParallelLinear
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_anymal.model.attention import DocumentPack
from megatron_anymal.model.compiled_ops import apply_rotary
from megatron_anymal.model.unsharded_weights import leave_unset


def layer_spec() -> ModuleSpec:
    """Return the specification of a Llama layer with Transformer Engine modules.

    Their attention's backward pass repeats bit for bit, unless NVTE_ALLOW_NONDETERMINISTIC_ALGO is set to 1.
    """
    # Read when layers are built. Transformer Engine's default allows other bits each time.
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = TurnedAttention
    return spec


class TurnedAttention(TEDotProductAttention):
    """Transformer Engine's attention for packed documents ("thd"), which also splits them over context-parallel ranks;
    applies the rotary embedding first."""

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
        """Attend within documents: query [Q, n, d], key and value [Q, g, d] of this rank's tokens -> [Q, n * d].

        For packed documents, attention_mask and attention_bias are unused (None).
        """
        assert packed_seq_params is not None and packed_seq_params.rotation is not None
        query, key = apply_rotary(query, key, *packed_seq_params.rotation)
        if packed_seq_params.kernel is not None:
            # A pass of the key-value cache, which has a kernel of its own.
            return packed_seq_params.kernel(query, key, value, None).flatten(1)
        return super().forward(
            query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params, **more
        )


class NormLinear(TELayerNormColumnParallelLinear):
    """LayerNorm and a column-parallel linear layer as one module. Not part of the Llama's layers, so it never computes
    in FP8."""

    def __init__(self, inputs: int, outputs: int, parallel: ModelParallelConfig):
        ranks = parallel.tensor_model_parallel_size
        config = TransformerConfig(
            num_layers=1,
            hidden_size=inputs,
            num_attention_heads=ranks,
            tensor_model_parallel_size=ranks,
            params_dtype=parallel.params_dtype,
            normalization="LayerNorm",
        )
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=leave_unset,
            gather_output=False,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
        )

    def forward(self, x: Tensor) -> Any:
        """[..., inputs] -> [..., this rank's outputs], and None."""
        # Features may be a view of an encoder's output; the base class requires a contiguous tensor.
        return super().forward(x.contiguous())
