"""Modalities: convert media files to encoder input. Adding one takes one new file; see examples/thermal_modality.py."""

from megatron_anymal.modalities.base import MediaError, Modality
from megatron_anymal.modalities.registry import (
    MODALITIES,
    build_modality,
    kind_for_extension,
    load_plugins,
    register,
)

# Each module registers its modality on import.
from megatron_anymal.modalities.audio import AudioModality  # isort: skip
from megatron_anymal.modalities.image import ImageModality  # isort: skip
from megatron_anymal.modalities.imu import IMUModality  # isort: skip
from megatron_anymal.modalities.video import VideoModality  # isort: skip

__all__ = [
    "MODALITIES",
    "AudioModality",
    "IMUModality",
    "ImageModality",
    "MediaError",
    "Modality",
    "VideoModality",
    "build_modality",
    "kind_for_extension",
    "load_plugins",
    "register",
]
