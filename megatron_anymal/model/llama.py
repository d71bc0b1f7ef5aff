"""The Llama on megatron-core; the only module that builds a GPTModel."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_anymal import backend
from megatron_anymal.config import ConfigError, ModelConfig
from megatron_anymal.model.attention import PackedAttention
from megatron_anymal.model.compiled_ops import rms_norm
from megatron_anymal.model.fp8_weights import building, drop_transposes
from megatron_anymal.model.llama_shape import check_sizes
from megatron_anymal.model.nf4_weights import NF4Layer
from megatron_anymal.model.output_positions import select_output
from megatron_anymal.model.unsharded_weights import leave_unset


def check_model(model: ModelConfig, precision: str, hf: LlamaConfig) -> None:
    """Reject settings that this Llama or megatron-core cannot support. Needs no process group.

    Args:
        precision: `trainer.precision`.

    Raises:
        ConfigError: naming the sizes that do not divide, or with megatron-core's message.
    """
    try:
        transformer_config(model, precision, hf)
    except ConfigError:
        raise
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"megatron-core refuses the model's settings: {error}.") from error


def transformer_config(model: ModelConfig, precision: str, hf: LlamaConfig) -> TransformerConfig:
    """Build megatron-core's configuration of this Llama under this layout.

    Args:
        precision: `trainer.precision`.

    Raises:
        ConfigError: the Llama's sizes do not divide.
    """
    check_sizes(model, hf)
    interleaved = model.virtual_pipeline_model_parallel_size > 1
    first, last = model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage
    if first and model.pipeline_model_parallel_size == 2:
        # The last stage gets the rest. Given both, megatron-core divides by the number of stages between them, 0.
        last = 0
    dtype = backend.compute_dtype(precision)
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        ffn_hidden_size=hf.intermediate_size,
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size if interleaved else None,
        overlap_p2p_comm=interleaved and model.overlap_p2p_comm,
        batch_p2p_comm=not (interleaved and model.overlap_p2p_comm),
        context_parallel_size=model.context_parallel_size,
        sequence_parallel=model.sequence_parallel,
        num_layers_in_first_pipeline_stage=first or None,
        num_layers_in_last_pipeline_stage=last or None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The step's loss is already a mean over the batch's target tokens: megatron-core must not average again.
        calculate_per_token_loss=True,
        init_method=leave_unset,
        output_layer_init_method=leave_unset,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # SwiGLU as one kernel on a GPU; on every device it saves only its input for the backward pass.
        bias_activation_fusion=True,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        **_product_settings(model),
        **_recompute_settings(model),
    )


def _product_settings(model: ModelConfig) -> dict[str, Any]:
    """Return megatron-core's settings for matrix products in FP8, MXFP8 or NVFP4."""
    return {
        "fp8": model.fp8 or None,
        "fp8_recipe": model.fp8_recipe,
        "fp8_param": model.fp8_primary_weights,
        # The usual history of delayed scaling; other recipes ignore it.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "fp4": model.fp4 or None,
    }


def _recompute_settings(model: ModelConfig) -> dict[str, Any]:
    """Return megatron-core's settings for activation recomputation."""
    if model.recompute_granularity in ("", "auto"):
        # "auto" is left unresolved only for inference, which keeps no activations.
        return {}
    settings: dict[str, Any] = {"recompute_granularity": model.recompute_granularity}
    if model.recompute_granularity == "full":
        settings.update(recompute_method=model.recompute_method, recompute_num_layers=model.recompute_num_layers)
    else:
        settings.update(recompute_modules=list(model.recompute_modules))
    return settings


def build_gpt(
    hf: LlamaConfig,
    transformer: TransformerConfig,
    implementation: str,
    vp_stage: Optional[int] = None,
    base_quantization: str = "",
) -> GPTModel:
    """Build this pipeline stage's part of the Llama, with its weights not yet set.

    The attribute `inv_freq` holds the rotary embedding's frequencies, which the core attention applies, and
    `selects_output` whether the last layer can compute its output at some positions only.

    Args:
        implementation: "local" or "transformer_engine".
        vp_stage: index of the virtual pipeline chunk; None without a virtual pipeline.
        base_quantization: `model.base_quantization`; local layers only.
    """
    virtual: dict[str, Any] = {"ignore_virtual": False, "vp_stage": vp_stage}
    ranks = transformer.tensor_model_parallel_size
    with building(transformer):
        model = GPTModel(
            transformer,
            _layer_specs(transformer, implementation, vp_stage, base_quantization),
            vocab_size=-(-hf.vocab_size // ranks) * ranks,
            max_sequence_length=hf.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**virtual),
            post_process=parallel_state.is_pipeline_last_stage(**virtual),
            vp_stage=vp_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
            position_embedding_type="none",
            # The sequence is split after soft tokens are merged in.
            scatter_embedding_sequence_parallel=False,
        )
    drop_transposes(model)
    select_output(model)
    # Not a buffer, which would be rounded when the model is cast to bf16.
    model.inv_freq = LlamaRotaryEmbedding(config=hf).inv_freq.float()
    return model


def _layer_specs(
    transformer: TransformerConfig, implementation: str, vp_stage: Optional[int], base_quantization: str
) -> ModuleSpec | TransformerBlockSubmodules:
    if implementation == "transformer_engine":
        from megatron_anymal.model.transformer_engine import layer_spec

        return layer_spec()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    if base_quantization:
        spec.module = NF4Layer
    layers = get_num_layers_to_build(transformer, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


class RMSNorm(nn.Module):
    """RMSNorm that works under sequence parallelism (megatron-core's own without Transformer Engine refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: Any):
        super().__init__()
        self.eps = eps
        weight: Any = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=torch.device("cuda")))
        # Makes megatron-core sum its gradient over the ranks that share the sequence.
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        return rms_norm(x, self.weight, self.eps)
