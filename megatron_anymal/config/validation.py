"""Validation of a run's settings, one by one and in combination."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional

from megatron_anymal.config.fault_grammar import check_faults
from megatron_anymal.config.schema import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    DpoConfig,
    ExpManagerConfig,
    ModalityConfig,
    ModelConfig,
    RunConfig,
)

# The global order is built in blocks with at least two slots per data set: a smaller share would make them huge.
SMALLEST_SHARE = 1e-5

# Valid entries of resilience.allow_changes.
CHANGES = ("config", "tokenizer", "base", "data")

CHOICES = {
    "job": ("pretrain", "sft", "dpo"),
    "trainer.precision": ("32", "bf16"),
    "exp_manager.checkpoint.keep_best_mode": ("min", "max"),
    "model.recompute_granularity": ("", "full", "selective", "auto"),
    "model.recompute_method": ("uniform", "block"),
    "model.transformer_impl": ("auto", "local", "transformer_engine"),
    "model.attention": ("auto", "flash_attn", "flex", "sdpa"),
    "model.fp8": ("", "hybrid", "e4m3"),
    "model.fp8_recipe": ("tensorwise", "delayed"),
    "model.neftune.embeddings": ("all", "text"),
    "model.dpo.reference": ("cached", "recomputed"),
    "model.loss_normalization": ("token", "sample"),
    "model.encoder_costs": ("operations", "measured", "configured"),
    "model.optim.sched.name": ("cosine", "linear", "constant"),
    "data.too_long": ("refuse", "drop"),
}

AT_LEAST = {
    "trainer.num_nodes": 1,
    "trainer.devices": 1,
    "trainer.max_steps": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.val_check_interval": 0,
    "trainer.limit_val_batches": 0,
    "trainer.sampled_answers": 0,
    "trainer.gradient_clip_val": 0,
    "exp_manager.checkpoint.every_n_train_steps": 0,
    "exp_manager.checkpoint.keep_last": 0,
    "exp_manager.checkpoint.keep_every_n_steps": 0,
    "exp_manager.checkpoint.keep_best": 0,
    "exp_manager.lock_timeout_seconds": 1,
    "model.tensor_model_parallel_size": 1,
    "model.pipeline_model_parallel_size": 1,
    "model.virtual_pipeline_model_parallel_size": 1,
    "model.context_parallel_size": 1,
    "model.num_layers_in_first_pipeline_stage": 0,
    "model.num_layers_in_last_pipeline_stage": 0,
    "model.lora.r": 0,
    "model.lora.dropout": 0,
    "model.neftune.alpha": 0,
    "model.dpo.label_smoothing": 0,
    "model.micro_batch_size": 1,
    "model.global_batch_size": 1,
    "model.recompute_num_layers": 1,
    "model.memory_gb": 0,
    "model.optim.lr": 0,
    "model.optim.weight_decay": 0,
    "model.optim.sched.warmup_steps": 0,
    "model.optim.sched.decay_steps": 0,
    "model.optim.sched.min_lr_ratio": 0,
    "data.seq_length": 1,
    "data.max_bad_share": 0,
    "data.num_workers": 0,
    "data.prefetch_steps": 1,
    "data.worker_memory_limit_gib": 0,
    "data.limits.max_load_bytes": 1,
    "data.limits.max_pixels": 1,
    "data.limits.max_frame_pixels": 1,
    "data.limits.max_seconds": 0,
    "data.limits.max_values": 1,
    "data.limits.max_member_bytes": 1,
    "data.limits.max_text_bytes": 1,
    "data.limits.max_json_depth": 4,
    "resilience.hang_timeout": 0,
    "resilience.startup_timeout": 1,
    "resilience.checkpoint_timeout": 1,
    "resilience.max_skipped_steps": 1,
    "resilience.straggler_ratio": 1,
    "resilience.peer_memory_interval": 0,
}


def value_at(config: RunConfig, key: str) -> Any:
    """Return the value of a dotted key."""
    node: Any = config
    for part in key.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node


def check(config: RunConfig) -> None:
    """Reject settings that cannot work, before any process group or file is touched.

    Raises:
        ConfigError: the message names the key and the fix.
    """
    _check_values(config)
    _check_checkpoints(config)
    check_layout(config)
    _check_model(config)
    _check_data(config.data, config.model.modalities)
    _check_resilience(config)


def _check_values(config: RunConfig) -> None:
    for key, choices in CHOICES.items():
        if value_at(config, key) not in choices:
            shown = ", ".join(repr(c) for c in choices)
            raise ConfigError(f"{key}={value_at(config, key)!r} is not one of {shown}.")
    for key, least in AT_LEAST.items():
        if value_at(config, key) < least:
            raise ConfigError(f"{key}={value_at(config, key)} must be at least {least}.")
    if len(config.model.optim.betas) != 2:
        raise ConfigError(f"model.optim.betas={config.model.optim.betas} must hold two numbers.")
    max_time_seconds(config.exp_manager)


def _check_checkpoints(config: RunConfig) -> None:
    rules, where = config.exp_manager.checkpoint, "exp_manager.checkpoint"
    every, kept = rules.every_n_train_steps, rules.keep_every_n_steps
    for name in ("keep_every_n_steps", "keep_best"):
        if getattr(rules, name) and not rules.keep_last:
            raise ConfigError(f"{where}.{name} has no effect: {where}.keep_last=0 keeps all. Change one of them.")
    if kept and (not every or kept % every):
        raise ConfigError(
            f"{where}.keep_every_n_steps={kept} must be a multiple of {where}.every_n_train_steps={every}, or most of "
            "the steps it selects have no checkpoint."
        )
    if rules.keep_best:
        _check_best(config, rules)
    elif (rules.keep_best_metric, rules.keep_best_mode) != (CheckpointConfig().keep_best_metric, "min"):
        raise ConfigError(f"{where}.keep_best_metric and keep_best_mode have no effect with keep_best=0. Remove them.")


def _check_best(config: RunConfig, rules: CheckpointConfig) -> None:
    where, trainer = "exp_manager.checkpoint", config.trainer
    if not config.data.validation or not trainer.limit_val_batches or not trainer.val_check_interval:
        raise ConfigError(
            f"{where}.keep_best={rules.keep_best} needs validations: data.validation, and trainer.limit_val_batches "
            "and trainer.val_check_interval above 0. Set them, or keep_best to 0."
        )
    if not rules.every_n_train_steps or rules.every_n_train_steps % trainer.val_check_interval:
        raise ConfigError(
            f"{where}.keep_best={rules.keep_best} compares validation results from the checkpoints' own steps: "
            f"{where}.every_n_train_steps={rules.every_n_train_steps} must be a multiple of "
            f"trainer.val_check_interval={trainer.val_check_interval}."
        )
    known = ["val_loss", *(f"val_loss/{name}" for name in ["text", *config.model.modalities])]
    metric = rules.keep_best_metric
    if metric not in known and not (config.job == "dpo" and metric.startswith("val_")):
        raise ConfigError(f"{where}.keep_best_metric={metric!r} is not one of {', '.join(known)}.")


def check_layout(config: RunConfig) -> None:
    """Reject parallel sizes, recomputation and number formats that cannot work together, whatever the Llama.

    Raises:
        ConfigError: the message names the key and the fix.
    """
    _check_parallel_sizes(config)
    _check_recompute(config.model)
    _check_fp8(config.model)


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
    for name, modality in m.modalities.items():
        heads = modality.projector.num_attention_heads
        if modality.projector.type == "resampler" and heads % m.tensor_model_parallel_size:
            raise ConfigError(
                f"model.tensor_model_parallel_size={m.tensor_model_parallel_size} does not divide "
                f"model.modalities.{name}.projector.num_attention_heads={heads}."
            )
    edges = m.num_layers_in_first_pipeline_stage or m.num_layers_in_last_pipeline_stage
    if edges and m.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "model.num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage need "
            "model.pipeline_model_parallel_size > 1. Set them to 0."
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


def _check_model(config: RunConfig) -> None:
    lm = config.model.language_model
    given = [name for name in ("path", "config", "checkpoint") if getattr(lm, name)]
    if len(given) != 1:
        raise ConfigError(
            "model.language_model needs exactly one of path (a HuggingFace folder), config (a shape with random "
            f"weights) and checkpoint (written by this trainer); given: {', '.join(given) or 'none'}."
        )
    _check_encoder_costs(config.model)
    _check_lora(config.model)
    if config.job == "dpo":
        _check_dpo(config.model)
    elif config.model.dpo != DpoConfig():
        raise ConfigError(f"model.dpo has no effect on the job {config.job}. Remove it, or set job=dpo.")
    placeholders: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for name, modality in config.model.modalities.items():
        where = f"model.modalities.{name}"
        if not modality.encoder.type:
            raise ConfigError(f"{where}.encoder.type is empty. Name the architecture, for example clip.")
        if modality.encoder.path and modality.encoder.config:
            raise ConfigError(
                f"{where}.encoder has both path and config. The folder has its own config; remove config."
            )
        if modality.projector.type not in ("resampler", "linear"):
            raise ConfigError(f"{where}.projector.type={modality.projector.type!r} is not resampler or linear.")
        if modality.projector.num_tokens < 1 or modality.projector.num_layers < 1:
            raise ConfigError(f"{where}.projector needs num_tokens and num_layers of at least 1.")
        if not modality.placeholder:
            raise ConfigError(f"{where}.placeholder is empty. Name a reserved token of the vocabulary.")
        if modality.placeholder in placeholders:
            raise ConfigError(
                f"{where}.placeholder={modality.placeholder!r} is also the placeholder of "
                f"{placeholders[modality.placeholder]!r}. Each modality needs its own."
            )
        placeholders[modality.placeholder] = name
        kind = modality.kind or name
        if kind in kinds:
            raise ConfigError(
                f"{where} and model.modalities.{kinds[kind]} are both of the kind {kind!r}, so it is "
                "ambiguous which of them reads a sample's media. Remove one."
            )
        kinds[kind] = name


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


def _check_encoder_costs(model: ModelConfig) -> None:
    configured = model.encoder_costs == "configured"
    if model.encoder_costs != "operations" and not model.modalities:
        raise ConfigError(
            f"model.encoder_costs={model.encoder_costs} has no effect without model.modalities. Remove it."
        )
    for name, modality in model.modalities.items():
        cost, key = modality.cost_per_piece, f"model.modalities.{name}.cost_per_piece"
        if cost and not configured:
            raise ConfigError(
                f"{key}={cost} has no effect with model.encoder_costs={model.encoder_costs}. Set "
                "model.encoder_costs=configured, or remove it."
            )
        if configured and not 0 < cost < math.inf:
            raise ConfigError(
                f"{key}={cost} must be above 0, because model.encoder_costs=configured compares all modalities by it."
            )


def _check_lora(model: ModelConfig) -> None:
    lora = model.lora
    if not lora.r:
        return
    if not model.language_model.freeze:
        raise ConfigError(
            f"model.lora.r={lora.r} adds adapters to a frozen Llama, but "
            "model.language_model.freeze=false. Set that to true, or model.lora.r to 0."
        )
    if not (lora.alpha > 0 and math.isfinite(lora.alpha)):
        raise ConfigError(f"model.lora.alpha={lora.alpha} must be above 0.")
    if lora.dropout >= 1:
        raise ConfigError(f"model.lora.dropout={lora.dropout} must be less than 1.")
    if not lora.targets:
        raise ConfigError(
            'model.lora.targets is empty: nothing would be adapted. Set it to ["*"], or model.lora.r to 0.'
        )


def _check_fp8(model: ModelConfig) -> None:
    if not model.fp8 and (model.fp8_primary_weights or model.fp8_recipe != ModelConfig().fp8_recipe):
        raise ConfigError(
            "model.fp8_recipe and model.fp8_primary_weights have no effect without model.fp8. Set it to hybrid or "
            "e4m3, or remove them."
        )
    if model.fp8_primary_weights and not model.language_model.freeze:
        raise ConfigError(
            "model.fp8_primary_weights=true needs a frozen Llama, but model.language_model.freeze=false: updates are "
            "smaller than the spacing of FP8 numbers. Change one of them."
        )


def _check_dpo(model: ModelConfig) -> None:
    dpo = model.dpo
    if not dpo.beta > 0:
        raise ConfigError(f"model.dpo.beta={dpo.beta} must be above 0.")
    if dpo.label_smoothing >= 0.5:
        raise ConfigError(f"model.dpo.label_smoothing={dpo.label_smoothing} must be less than 0.5.")
    if model.loss_normalization != "token":
        raise ConfigError("model.loss_normalization has no effect on the job dpo, which counts pairs. Set it to token.")
    if not (model.lora.r and model.restore_from_path):
        raise ConfigError(
            "The job dpo continues from the adapters of an SFT run, which also serve as its reference: it needs "
            "model.lora as in that run, and model.restore_from_path set to that run's folder or checkpoint."
        )
    for name, modality in model.modalities.items():
        if not (modality.encoder.freeze and modality.projector.freeze):
            raise ConfigError(
                f"The job dpo trains the adapters only: set model.modalities.{name}.projector.freeze and "
                f"model.modalities.{name}.encoder.freeze to true."
            )


def _check_data(data: DataConfig, modalities: Mapping[str, ModalityConfig]) -> None:
    for split in ("train", "validation"):
        total = sum(dataset.weight for dataset in getattr(data, split).values())
        for name, dataset in getattr(data, split).items():
            if not dataset.path:
                raise ConfigError(f"data.{split}.{name}.path is empty. Name a folder created by `anymal prepare`.")
            if not (dataset.weight > 0 and math.isfinite(dataset.weight)):
                raise ConfigError(f"data.{split}.{name}.weight={dataset.weight} must be above 0.")
            if dataset.weight < SMALLEST_SHARE * total:
                raise ConfigError(
                    f"data.{split}.{name}.weight={dataset.weight} is less than {SMALLEST_SHARE} of the mix. Raise it, "
                    "or remove the data set."
                )
    # A Llama without data sets or modalities gets token ids as input and needs no tokenizer.
    if not data.tokenizer and (data.train or data.validation or modalities):
        raise ConfigError("data.tokenizer is empty. Name a local folder with a HuggingFace tokenizer.")
    if data.worker_memory_limit_gib and not data.num_workers:
        raise ConfigError(
            f"data.worker_memory_limit_gib={data.worker_memory_limit_gib} needs loader processes: with "
            "data.num_workers=0 the training process reads the data, and it cannot be restarted between two steps. Set "
            "data.num_workers, or the limit to 0."
        )


def _check_resilience(config: RunConfig) -> None:
    for name in config.resilience.allow_changes:
        if name not in CHANGES:
            raise ConfigError(f"resilience.allow_changes: {name!r} is not one of {', '.join(CHANGES)}.")
    check_faults(config.resilience.faults, config.world_size, config.data.num_workers)


def max_time_seconds(manager: ExpManagerConfig) -> Optional[float]:
    """Return exp_manager.max_time_per_run in seconds, or None if there is no limit.

    Raises:
        ConfigError: not of the form DD:HH:MM:SS.
    """
    text = manager.max_time_per_run
    if not text:
        return None
    parts = text.split(":")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise ConfigError(f"exp_manager.max_time_per_run={text!r} is not of the form DD:HH:MM:SS (in quotes).")
    days, hours, minutes, seconds = (int(part) for part in parts)
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
