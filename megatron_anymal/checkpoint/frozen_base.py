"""Resolve the source of a Llama's weights if it is a checkpoint of this trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.state import load_language_model
from megatron_anymal.config import ConfigError, LanguageModelConfig, ModelConfig
from megatron_anymal.model.llama_shape import read_llama_config


def resolve_language_model(section: LanguageModelConfig) -> tuple[LanguageModelConfig, LlamaConfig]:
    """Follow the section's `checkpoint` to the source of the Llama's weights, and read the Llama's shape.

    A checkpoint of a run that kept the Llama frozen does not contain it; the base of that run is used instead.

    Returns:
        The section with the source resolved (the argument is not changed), and the Llama's HuggingFace configuration.

    Raises:
        CheckpointError: the checkpoint does not exist.
        ConfigError: the Llama's folder or keys cannot be used.
    """
    while section.checkpoint:
        folder = store.resolve(section.checkpoint)
        manifest = store.read_manifest(folder)
        inner = manifest.config["model"]["language_model"]
        if not inner["freeze"]:
            return replace(section, checkpoint=str(folder)), LlamaConfig.from_dict(manifest.llama)
        if manifest.config["model"].get("lora", {}).get("r"):
            raise ConfigError(
                f"model.language_model.checkpoint={str(folder)!r} holds adapters of a frozen Llama, which would be "
                "lost. Continue training them with model.restore_from_path."
            )
        if manifest.config["model"].get("discrete"):
            raise ConfigError(
                f"model.language_model.checkpoint={str(folder)!r} holds rows of marks and codes next to a frozen "
                "Llama, which would be lost. Continue training them with model.restore_from_path."
            )
        section = LanguageModelConfig(**{**inner, "freeze": section.freeze})
    return section, read_llama_config(section)


def check_codes_are_kept(model: ModelConfig) -> None:
    """Refuse a Llama that was trained with marks and codes if their rows would start anew.

    Args:
        model: with its `language_model` resolved.

    Raises:
        CheckpointError: the checkpoint does not exist.
        ConfigError: naming the checkpoint.
    """
    checkpoint = model.language_model.checkpoint
    if not checkpoint or model.restore_from_path:
        return
    if store.read_manifest(store.resolve(checkpoint)).config["model"].get("discrete"):
        raise ConfigError(
            f"model.language_model.checkpoint={checkpoint!r} was trained with marks and codes of discrete media, whose "
            "rows this run would not load. Set model.restore_from_path to the same checkpoint."
        )


def load_base(checkpoint: str, models: Sequence[Any]) -> None:
    """Set the Llama's weights from a resolved checkpoint.

    Raises:
        CheckpointError: a weight is missing from the checkpoint.
    """
    load_language_model(models, Path(checkpoint))
