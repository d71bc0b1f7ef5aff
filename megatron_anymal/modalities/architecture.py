"""Input format of an encoder, read from its configuration without loading weights.

Modalities need the resolution, the number of frames or the sampling rate; encoders are built from the same
configuration.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.modalities.base import nearest


@dataclass(frozen=True)
class Architecture:
    """An encoder implemented in transformers."""

    # Name of the model class.
    model: str
    # Name of the configuration class.
    config: str
    # `model_type` of folders with this encoder: the encoder alone, or a complete two-tower model that contains it.
    model_types: tuple[str, ...]


ARCHITECTURES = {
    "clip": Architecture("CLIPVisionModel", "CLIPVisionConfig", ("clip", "clip_vision_model")),
    "dinov2": Architecture("Dinov2Model", "Dinov2Config", ("dinov2",)),
    "videomae": Architecture("VideoMAEModel", "VideoMAEConfig", ("videomae",)),
    "clap": Architecture("ClapAudioModel", "ClapAudioConfig", ("clap", "clap_audio_model")),
}

# Keys with different names in transformers 4 and 5.
OTHER_NAMES = {"qv_bias": "qkv_bias", "qkv_bias": "qv_bias"}


def read_folder(encoder: EncoderConfig, model_types: tuple[str, ...]) -> dict[str, Any]:
    """Read the config.json of `encoder.path` and check its architecture.

    Raises:
        ConfigError: the folder or the file is missing or unreadable, or has another architecture.
    """
    config = read_json(Path(encoder.path), "config.json")
    if not config:
        raise ConfigError(
            f"encoder.path={encoder.path!r} is not a folder with a config.json. Name a local folder with a "
            f"{encoder.type} encoder."
        )
    model_type = config.get("model_type")
    if model_type not in model_types:
        raise ConfigError(
            f"encoder.path={encoder.path!r} has the architecture {model_type!r}, but encoder.type={encoder.type} "
            f"needs {' or '.join(repr(one) for one in model_types)}. Name another folder or another type."
        )
    return config


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a folder; empty if the file does not exist.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    file = folder / name
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}). Copy the folder again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object.")
    return content


def transformers_config(encoder: EncoderConfig) -> Any:
    """Load the transformers configuration of an encoder in `ARCHITECTURES` (for a two-tower model, of its vision or
    audio tower).

    Raises:
        ConfigError: neither a folder nor a shape is given, the folder has another architecture, a key is unknown, or a
            value is invalid.
    """
    import transformers

    architecture = ARCHITECTURES[encoder.type]
    config_class = getattr(transformers, architecture.config)
    if encoder.path:
        read_folder(encoder, architecture.model_types)
        try:
            return config_class.from_pretrained(encoder.path, local_files_only=True)
        except Exception as error:
            raise ConfigError(f"{encoder.path}/config.json cannot be used: {error}") from error
    if not encoder.config:
        raise ConfigError(
            f"encoder.path is empty. Name a local folder with a {encoder.type} encoder, or set encoder.config to the "
            "shape of an encoder with random weights."
        )
    known = _keys(config_class)
    keys = {}
    for name, value in encoder.config.items():
        key = OTHER_NAMES.get(name, name) if name not in known else name
        if key not in known:
            raise ConfigError(f"encoder.config.{name} is not a key of {architecture.config}. {nearest(name, known)}")
        # transformers requires plain lists; those of the configuration file may be other sequences.
        keys[key] = list(value) if isinstance(value, (list, tuple)) else value
    try:
        return config_class(**keys)
    except Exception as error:
        raise ConfigError(f"encoder.config is not a valid {architecture.config}: {error}") from error


def _keys(config_class: Any) -> list[str]:
    if dataclasses.is_dataclass(config_class):
        return [field.name for field in dataclasses.fields(config_class)]
    # transformers 4.
    return list(inspect.signature(config_class.__init__).parameters)[1:]


def preprocessor(encoder: EncoderConfig, part: str) -> dict[str, Any]:
    """Preprocessor settings of an encoder: from its section, or else from its folder; empty if neither has any.

    Args:
        part: "image_processor", "video_processor" or "feature_extractor": the key of the settings in a combined file.

    Raises:
        ConfigError: a file is not a JSON object.
    """
    if encoder.preprocessor or not encoder.path:
        return encoder.preprocessor
    folder = Path(encoder.path)
    single = read_json(folder, "preprocessor_config.json")
    return single or read_json(folder, "processor_config.json").get(part, {})
