"""What the features of a piece depend on besides the media file, as a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_anymal import modalities
from megatron_anymal.dependencies.installed import version_of
from megatron_anymal.modalities import Modality
from megatron_anymal.modalities.architecture import preprocessor
from megatron_anymal.model import encoders
from megatron_anymal.model.encoders import Encoder

# Packages that decode media, prepare pieces or run encoders.
_PACKAGES = (
    "av",
    "numpy",
    "pillow",
    "scipy",
    "simplejpeg",
    "soundfile",
    "soxr",
    "torch",
    "torchaudio",
    "torchvision",
    "transformers",
)
_PREPROCESSORS = ("image_processor", "video_processor", "feature_extractor")


def encoder_identity(modality: Modality, encoder: Encoder) -> str:
    """Hash of an encoder and of what prepares its input: weights, dtype, kind of device, settings, code and versions.

    Code is hashed as a whole: any change of a file of `modalities` or `model.encoders`, or of a plug-in's file, gives
    another identity. Numbers of pieces per call and the projector do not matter.

    Args:
        encoder: with the weights that it will use, on its device.

    Raises:
        ConfigError: the encoder's preprocessor settings are not JSON.
    """
    section = modality.config.encoder
    described: dict[str, Any] = {
        "modality": _name(modality),
        "options": dataclasses.asdict(modality.options),
        "piece_shape": modality.piece_shape,
        "preprocessor": {part: preprocessor(section, part) for part in _PREPROCESSORS},
        "encoder": _name(encoder),
        "settings": [section.type, section.config, _file_hash(Path(section.path, "config.json"))],
        "weights": weights_hash(encoder),
        "numbers": [str(encoder.dtype), encoder.device.type, torch.get_float32_matmul_precision()],
        "code": [_file_hash(path) for path in _source_files(modality, encoder)],
        "versions": [version_of(package) for package in _PACKAGES],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=repr).encode()).hexdigest()


def weights_hash(module: nn.Module) -> str:
    """Hash of a module's weights and buffers: names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _source_files(modality: Modality, encoder: Encoder) -> Iterator[Path]:
    """Files of this package's modalities and encoders, then those of a plug-in's classes."""
    for package in (modalities, encoders):
        yield from sorted(Path(package.__file__ or "").parent.glob("*.py"))
    for cls in (*type(modality).__mro__, *type(encoder).__mro__):
        if issubclass(cls, (Modality, Encoder)) and not cls.__module__.startswith("megatron_anymal."):
            yield Path(inspect.getfile(cls))


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
