"""What an encoder's section says about its input, read without loading weights.

The modalities need the resolution, the frames or the sampling rate; the encoders build on the same configuration.
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
    """An encoder that transformers implements."""

    model: str
    config: str
    # `model_type` of the folders that hold it; a folder of the whole two-tower model holds it as a part.
    model_types: tuple[str, ...]


ARCHITECTURES = {
    "clip": Architecture("CLIPVisionModel", "CLIPVisionConfig", ("clip", "clip_vision_model")),
    "dinov2": Architecture("Dinov2Model", "Dinov2Config", ("dinov2",)),
    "videomae": Architecture("VideoMAEModel", "VideoMAEConfig", ("videomae",)),
    "clap": Architecture("ClapAudioModel", "ClapAudioConfig", ("clap", "clap_audio_model")),
}

# Keys that transformers 4 and 5 call differently.
OTHER_NAMES = {"qv_bias": "qkv_bias", "qkv_bias": "qv_bias"}


def read_folder(encoder: EncoderConfig, model_types: tuple[str, ...]) -> dict[str, Any]:
    """The config.json of `encoder.path`, refused where it is of another architecture.

    Raises:
        ConfigError: the folder or the file is missing, unreadable, or of the wrong kind.
    """
    found = read_json(Path(encoder.path), "config.json")
    if not found:
        raise ConfigError(
            f"encoder.path={encoder.path!r} is not a folder with a config.json. Name a local folder with a "
            f"{encoder.type} encoder."
        )
    model_type = found.get("model_type")
    if model_type not in model_types:
        raise ConfigError(
            f"encoder.path={encoder.path!r} holds the architecture {model_type!r}, but encoder.type={encoder.type} "
            f"needs {' or '.join(repr(one) for one in model_types)}. Name another folder or another type."
        )
    return found


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder; empty where the file does not exist.

    Raises:
        ConfigError: not a JSON object.
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
    """The transformers configuration of an encoder of `ARCHITECTURES` (the vision or audio part of a two-tower one).

    Raises:
        ConfigError: neither folder nor shape given, a folder of the wrong kind, an unknown key, an impossible value.
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
            f"encoder.path is empty. Name a local folder with a {encoder.type} encoder, or give encoder.config, the "
            "keys of a shape with random weights."
        )
    known = _keys(config_class)
    keys = {}
    for name, value in encoder.config.items():
        key = OTHER_NAMES.get(name, name) if name not in known else name
        if key not in known:
            raise ConfigError(f"encoder.config.{name} is not a key of {architecture.config}. {nearest(name, known)}")
        # Lists of the configuration file may arrive as other sequences; transformers wants plain ones.
        keys[key] = list(value) if isinstance(value, (list, tuple)) else value
    try:
        return config_class(**keys)
    except Exception as error:
        raise ConfigError(f"encoder.config is not a possible {architecture.config}: {error}") from error


def _keys(config_class: Any) -> list[str]:
    if dataclasses.is_dataclass(config_class):
        return [field.name for field in dataclasses.fields(config_class)]
    # transformers 4.
    return list(inspect.signature(config_class.__init__).parameters)[1:]


def preprocessor(encoder: EncoderConfig, part: str) -> dict[str, Any]:
    """How media are prepared for an encoder: as its section says, else as its folder does; empty where neither says.

    Args:
        part: "image_processor", "video_processor" or "feature_extractor": the key where a combined file nests it.
    """
    if encoder.preprocessor or not encoder.path:
        return encoder.preprocessor
    folder = Path(encoder.path)
    single = read_json(folder, "preprocessor_config.json")
    return single or read_json(folder, "processor_config.json").get(part, {})
