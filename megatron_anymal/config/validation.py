"""Validation of a run's settings, one by one and in combination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from megatron_anymal.config.data_section import DataConfig
from megatron_anymal.config.fault_grammar import check_faults
from megatron_anymal.config.layout_validation import check_layout
from megatron_anymal.config.model_section import ModalityConfig
from megatron_anymal.config.model_validation import check_model
from megatron_anymal.config.multiplex_validation import check_multiplex
from megatron_anymal.config.schedule_validation import check_mixtures
from megatron_anymal.config.schema import CheckpointConfig, ConfigError, ExpManagerConfig, RunConfig
from megatron_anymal.config.storage_validation import check_feature_cache, check_storage

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
    "model.fp8_recipe": ("tensorwise", "delayed", "mxfp8"),
    "model.fp4": ("", "e2m1"),
    "model.base_quantization": ("", "nf4"),
    "model.neftune.embeddings": ("all", "text"),
    "model.discrete_init": ("statistics", "normal"),
    "model.discrete_rows": ("new", "all", "none"),
    "model.dpo.reference": ("cached", "recomputed"),
    "model.dpo.share_prompt": ("auto", "always", "never"),
    "model.loss_normalization": ("token", "sample"),
    "model.encoder_costs": ("operations", "measured", "configured"),
    "model.encoder_placement": ("first_stage", "all_stages"),
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
    "data.storage.attempts": 1,
    "data.storage.timeout_seconds": 1,
    "data.storage.connections": 1,
    "data.storage.read_ahead": 0,
    "data.storage.gap_kib": 0,
    "data.storage.cache_gib": 0,
    "data.storage.cache_block_kib": 4,
    "data.feature_cache.gib": 0,
    "resilience.hang_timeout": 0,
    "resilience.startup_timeout": 1,
    "resilience.checkpoint_timeout": 1,
    "resilience.max_skipped_steps": 1,
    "resilience.straggler_ratio": 1,
    "resilience.peer_memory_interval": 0,
}

# The same of each alignment of model.multiplex.
_ALIGNMENT_AT_LEAST = {"global_batch_size": 1, "max_steps": 0, "gradient_clip_val": 0}


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
    check_model(config.job, config.model)
    _check_data(config.data, config.model.modalities)
    check_multiplex(config.job, config.trainer, config.model, config.data)
    check_mixtures(config.data, config.trainer.max_steps)
    check_storage(config.data, config.resilience)
    check_feature_cache(config.data.feature_cache, config.model.modalities)
    _check_resilience(config)


def _check_values(config: RunConfig) -> None:
    alignments = [f"model.multiplex.{name}" for name in config.model.multiplex]
    for key, choices in CHOICES.items():
        for full_key in _full_keys(key, alignments):
            if value_at(config, full_key) not in choices:
                shown = ", ".join(repr(c) for c in choices)
                raise ConfigError(f"{full_key}={value_at(config, full_key)!r} is not one of {shown}.")
    of_alignments = {f"{one}.{key}": least for one in alignments for key, least in _ALIGNMENT_AT_LEAST.items()}
    for key, least in (AT_LEAST | of_alignments).items():
        for full_key in _full_keys(key, alignments):
            if value_at(config, full_key) < least:
                raise ConfigError(f"{full_key}={value_at(config, full_key)} must be at least {least}.")
    for full_key in _full_keys("model.optim.betas", alignments):
        if len(value_at(config, full_key)) != 2:
            raise ConfigError(f"{full_key}={value_at(config, full_key)} must hold two numbers.")
    max_time_seconds(config.exp_manager)


def _full_keys(key: str, alignments: Sequence[str]) -> list[str]:
    """A key, and for one of the optimizer the same of each alignment of model.multiplex."""
    rest = key.removeprefix("model.optim.")
    return [key] if rest == key else [key, *(f"{one}.optim.{rest}" for one in alignments)]


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


def _check_data(data: DataConfig, modalities: Mapping[str, ModalityConfig]) -> None:
    for split in ("train", "validation"):
        for name, dataset in getattr(data, split).items():
            if not dataset.path:
                raise ConfigError(f"data.{split}.{name}.path is empty. Name a folder created by `anymal prepare`.")
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
    interval = config.resilience.peer_memory_interval
    if interval and not config.resilience.peer_memory:
        raise ConfigError(
            f"resilience.peer_memory_interval={interval} has no effect with resilience.peer_memory=false. Remove one."
        )
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
