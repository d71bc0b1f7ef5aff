"""Validation of the Llama, the modalities and the objective."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_anymal.config.discrete_validation import check_discrete
from megatron_anymal.config.model_section import DpoConfig, ModalityConfig, ModelConfig
from megatron_anymal.config.schema import ConfigError


def check_model(job: str, model: ModelConfig) -> None:
    """Reject settings of the Llama, the modalities and the objective that cannot work together.

    Raises:
        ConfigError: the message names the key and the fix.
    """
    lm = model.language_model
    given = [name for name in ("path", "config", "checkpoint") if getattr(lm, name)]
    if len(given) != 1:
        raise ConfigError(
            "model.language_model needs exactly one of path (a HuggingFace folder), config (a shape with random "
            f"weights) and checkpoint (written by this trainer); given: {', '.join(given) or 'none'}."
        )
    _check_encoder_costs(model)
    _check_lora(model)
    if job == "dpo":
        _check_dpo(model)
    elif model.dpo != DpoConfig():
        raise ConfigError(f"model.dpo has no effect on the job {job}. Remove it, or set job=dpo.")
    _check_modalities(model.modalities)
    check_discrete(job, model)


def _check_modalities(modalities: Mapping[str, ModalityConfig]) -> None:
    placeholders: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for name, modality in modalities.items():
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
