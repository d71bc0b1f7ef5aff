"""Validation of parallel sizes, recomputation and number formats."""

from __future__ import annotations

from megatron_anymal.config.model_section import ModelConfig
from megatron_anymal.config.schema import ConfigError, RunConfig


def check_layout(config: RunConfig) -> None:
    """Reject parallel sizes, recomputation and number formats that cannot work together, whatever the Llama.

    Raises:
        ConfigError: the message names the key and the fix.
    """
    _check_parallel_sizes(config)
    _check_pipeline(config.model)
    _check_encoder_placement(config.model)
    _check_recompute(config.model)
    _check_fp8(config.model)
    _check_base_quantization(config.model)


def _check_parallel_sizes(config: RunConfig) -> None:
    m = config.model
    if config.world_size % m.model_parallel_size:
        raise ConfigError(
            f"trainer.num_nodes x trainer.devices = {config.world_size} processes do not divide into replicas of "
            f"model.tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size = "
            f"{m.model_parallel_size}. Change trainer.devices, trainer.num_nodes or the parallel sizes."
        )
    if m.sequence_parallel and m.tensor_model_parallel_size == 1:
        raise ConfigError(
            "model.sequence_parallel=true needs model.tensor_model_parallel_size > 1: it splits the sequence over "
            "the tensor-parallel ranks. Set it to false."
        )
    # Every document, even the longest, is padded so that it splits evenly over the context-parallel ranks.
    if m.context_parallel_size > 1 and config.data.seq_length % (2 * m.context_parallel_size):
        raise ConfigError(
            f"data.seq_length={config.data.seq_length} must be a multiple of {2 * m.context_parallel_size}: each "
            f"document is cut into 2 x model.context_parallel_size={m.context_parallel_size} equal chunks."
        )
    for name, modality in m.modalities.items():
        heads = modality.projector.num_attention_heads
        if modality.projector.type == "resampler" and heads % m.tensor_model_parallel_size:
            raise ConfigError(
                f"model.tensor_model_parallel_size={m.tensor_model_parallel_size} does not divide "
                f"model.modalities.{name}.projector.num_attention_heads={heads}."
            )
    if config.trainer.sampled_answers and not config.data.validation:
        raise ConfigError(
            f"trainer.sampled_answers={config.trainer.sampled_answers} has no validation samples to answer. Name a "
            "folder in data.validation, or set it to 0."
        )
    if config.trainer.sampled_answers and (m.context_parallel_size > 1 or m.virtual_pipeline_model_parallel_size > 1):
        raise ConfigError(
            "trainer.sampled_answers needs model.context_parallel_size=1 and "
            "model.virtual_pipeline_model_parallel_size=1: generation during training supports neither. Set it to 0."
        )
    if m.ddp.overlap_param_gather and not (m.ddp.use_distributed_optimizer and m.ddp.overlap_grad_reduce):
        raise ConfigError(
            "model.ddp.overlap_param_gather=true needs model.ddp.use_distributed_optimizer=true and "
            "model.ddp.overlap_grad_reduce=true."
        )


def _check_pipeline(m: ModelConfig) -> None:
    if not m.overlap_p2p_comm and m.virtual_pipeline_model_parallel_size == 1:
        raise ConfigError(
            "model.overlap_p2p_comm=false has no effect without a virtual pipeline "
            "(model.virtual_pipeline_model_parallel_size > 1). Remove it."
        )
    if m.virtual_pipeline_model_parallel_size > 1 and m.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "model.virtual_pipeline_model_parallel_size > 1 needs model.pipeline_model_parallel_size > 1: it splits "
            "pipeline stages into chunks. Set it to 1."
        )
    if not m.overlap_p2p_comm and m.virtual_pipeline_model_parallel_size > 1 and m.pipeline_model_parallel_size == 2:
        raise ConfigError(
            "model.overlap_p2p_comm=false with a virtual pipeline of two stages gives wrong gradients: "
            "model.pipeline_model_parallel_size=2 makes the previous and the next stage the same rank, and "
            "megatron-core then mixes up activations and gradients. Set model.overlap_p2p_comm=true."
        )
    edges = m.num_layers_in_first_pipeline_stage or m.num_layers_in_last_pipeline_stage
    if edges and m.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "model.num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage need "
            "model.pipeline_model_parallel_size > 1. Set them to 0."
        )


def _check_encoder_placement(m: ModelConfig) -> None:
    if m.encoder_placement != "all_stages":
        return
    if m.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "model.encoder_placement=all_stages shares the encoders' work among pipeline stages, but "
            "model.pipeline_model_parallel_size=1. Set it to first_stage, or use more stages."
        )
    if not m.modalities:
        raise ConfigError("model.encoder_placement=all_stages has no effect without model.modalities. Remove it.")
    for name, modality in m.modalities.items():
        if not modality.encoder.freeze:
            raise ConfigError(
                f"model.encoder_placement=all_stages needs frozen encoders, but the encoder of {name!r} trains: its "
                "gradient exists on the first stage only, and encoding ahead would use old weights. Set "
                f"model.modalities.{name}.encoder.freeze=true, or encoder_placement to first_stage."
            )


def _check_recompute(model: ModelConfig) -> None:
    defaults = ModelConfig()
    if model.recompute_granularity != "auto":
        return
    for name in ("recompute_method", "recompute_num_layers", "recompute_modules"):
        if getattr(model, name) != getattr(defaults, name):
            raise ConfigError(
                f"model.{name} has no effect with model.recompute_granularity=auto, which chooses it. Remove it, or "
                "name the granularity."
            )


def _check_fp8(model: ModelConfig) -> None:
    if not model.fp8 and (model.fp8_primary_weights or model.fp8_recipe != ModelConfig().fp8_recipe):
        raise ConfigError(
            "model.fp8_recipe and model.fp8_primary_weights have no effect without model.fp8. Set it to hybrid or "
            "e4m3, or remove them."
        )
    if model.fp8 and model.fp4:
        raise ConfigError(
            f"model.fp8={model.fp8} and model.fp4={model.fp4} are mutually exclusive: a matmul has one format. Set one "
            "of them to ''."
        )
    if model.fp8_primary_weights and model.fp8_recipe == "mxfp8":
        raise ConfigError(
            "model.fp8_primary_weights=true does not save memory with model.fp8_recipe=mxfp8: the backward pass needs "
            "a second copy, scaled along the other dimension, which cannot be made from the first. Together they take "
            "2.06 bytes per parameter, more than bf16. Set model.fp8_primary_weights=false, or "
            "model.fp8_recipe=tensorwise."
        )
    if model.fp8_primary_weights and not model.language_model.freeze:
        raise ConfigError(
            "model.fp8_primary_weights=true needs a frozen Llama, but model.language_model.freeze=false: updates are "
            "smaller than the spacing of FP8 numbers. Change one of them."
        )


def _check_base_quantization(model: ModelConfig) -> None:
    name = model.base_quantization
    if not name:
        return
    if not model.language_model.freeze:
        raise ConfigError(
            f"model.base_quantization={name} needs a frozen Llama, but model.language_model.freeze=false: updates are "
            "smaller than the spacing of 4-bit numbers. Set that to true, and model.lora.r to train adapters; or set "
            "model.base_quantization=''."
        )
    if model.fp8 or model.fp4:
        other = f"model.fp8={model.fp8}" if model.fp8 else f"model.fp4={model.fp4}"
        raise ConfigError(
            f"model.base_quantization={name} and {other} are mutually exclusive: FP8 and NVFP4 need Transformer "
            "Engine's layers, which do not compute with NF4 weights. Set one of them to ''."
        )
    if model.transformer_impl == "transformer_engine":
        raise ConfigError(
            f"model.base_quantization={name} needs megatron-core's own layers: those of "
            "model.transformer_impl=transformer_engine do not compute with NF4 weights. Set that to auto, or "
            "model.base_quantization=''."
        )
