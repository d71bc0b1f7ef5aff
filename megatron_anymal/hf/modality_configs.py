"""The modality sections of an export's configuration: everything needed to rebuild a modality without its encoder's
folder."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from megatron_anymal.config import DiscreteConfig, EncoderConfig, ModalityConfig
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.modalities.architecture import ARCHITECTURES, preprocessor, read_folder, transformers_config


def export_sections(modalities: Mapping[str, ModalityConfig], tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Build each modality's section for `AnyMALConfig` and `AnyMALProcessor`, as plain JSON.

    Raises:
        ConfigError, DataError: the folder of an encoder cannot be read, or the tokenizer lacks a placeholder.
    """
    return {name: _section(name, section, tokenizer) for name, section in modalities.items()}


def export_discrete(base_size: int, sections: Mapping[str, DiscreteConfig]) -> dict[str, Any]:
    """Build `discrete` of `AnyMALConfig` and `AnyMALProcessor`, as plain JSON; empty without sections.

    Args:
        base_size: size of the Llama's own vocabulary.
        sections: `model.discrete`.
    """
    if not sections:
        return {}
    return {"base_size": base_size, "sections": {name: dataclasses.asdict(one) for name, one in sections.items()}}


def _section(name: str, section: ModalityConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    projector = dataclasses.asdict(section.projector)
    del projector["freeze"]
    return copy.deepcopy(
        {
            "kind": section.kind or name,
            "encoder": {
                "type": section.encoder.type,
                "config": _shape(section.encoder),
                "preprocessor": dict(_preprocessor(section.encoder)),
                "max_pieces_per_call": section.encoder.max_pieces_per_call,
            },
            "projector": projector,
            "options": dict(section.options),
            "placeholder": section.placeholder,
            "placeholder_id": tokenizer.placeholder(section.placeholder, f"model.modalities.{name}.placeholder"),
        }
    )


def _shape(encoder: EncoderConfig) -> dict[str, Any]:
    """The encoder's shape, without the keys that are common to all configurations of transformers."""
    if encoder.type not in ARCHITECTURES:
        if encoder.type != "imu2clip" or not encoder.path:
            return dict(encoder.config)
        config = read_folder(encoder, ("imu2clip",))
        return {key: value for key, value in config.items() if key != "model_type"}
    shape: Any = transformers_config(encoder)
    common = {field.name for field in dataclasses.fields(PretrainedConfig)}
    own = [field.name for field in dataclasses.fields(shape) if field.name not in common]
    # Names with an underscore select the outputs of a backbone, which these encoders do not have.
    return {key: _plain(getattr(shape, key)) for key in own if not key.startswith("_")}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _preprocessor(encoder: EncoderConfig) -> dict[str, Any]:
    return preprocessor(encoder, "feature_extractor" if encoder.type == "clap" else "image_processor")
