"""The frozen base: where a Llama's weights come from when a checkpoint of this trainer stands for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.state import load_language_model
from megatron_anymal.config import ConfigError, LanguageModelConfig, RunConfig
from megatron_anymal.model.llama import read_llama_config


def resolve_language_model(config: RunConfig) -> tuple[RunConfig, LlamaConfig]:
    """Follow `model.language_model.checkpoint` to what holds the Llama's weights, and read the Llama's shape.

    A checkpoint of a run that kept the Llama frozen holds none of it: that run's own base is taken.

    Returns:
        The configuration with the source made plain, and the Llama's HuggingFace configuration.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: the Llama's folder or keys cannot be used.
    """
    config = copy.deepcopy(config)
    lm = config.model.language_model
    while lm.checkpoint:
        folder = store.resolve(lm.checkpoint)
        manifest = store.read_manifest(folder)
        inner = manifest.config["model"]["language_model"]
        if not inner["freeze"]:
            lm.checkpoint = str(folder)
            return config, LlamaConfig.from_dict(manifest.llama)
        if manifest.config["model"].get("lora", {}).get("r"):
            raise ConfigError(
                f"model.language_model.checkpoint={str(folder)!r} holds adapters beside a frozen Llama, which would be "
                "lost. Continue them with model.restore_from_path."
            )
        config.model.language_model = lm = LanguageModelConfig(**{**inner, "freeze": lm.freeze})
    return config, read_llama_config(lm)


def load_base(checkpoint: str, models: Sequence[Any]) -> None:
    """Set the Llama's weights from a resolved checkpoint."""
    load_language_model(models, Path(checkpoint))
