"""Modalities: media files to encoder input. A fifth one is one new file; see examples/thermal_modality.py."""

from megatron_anymal.modalities.base import MediaError, Modality
from megatron_anymal.modalities.registry import (
    MODALITIES,
    build_modality,
    kind_for_extension,
    load_plugins,
    register,
)

from megatron_anymal.modalities import audio, image, imu, video  # noqa: F401  (each registers itself)  # isort: skip

__all__ = [
    "MODALITIES",
    "MediaError",
    "Modality",
    "build_modality",
    "kind_for_extension",
    "load_plugins",
    "register",
]
