"""Encoders from media pieces to features. Architectures come from transformers, except IMU2CLIP's."""

from megatron_anymal.model.encoders.base import (
    ENCODERS,
    Encoder,
    build_encoder,
    load_weights,
    register_encoder,
    seeded_encoder,
)

# Importing an encoder registers it.
from megatron_anymal.model.encoders.audio import CLAPEncoder  # isort: skip
from megatron_anymal.model.encoders.identity import IdentityEncoder  # isort: skip
from megatron_anymal.model.encoders.imu import IMU2CLIPEncoder  # isort: skip
from megatron_anymal.model.encoders.video import VideoMAEEncoder  # isort: skip
from megatron_anymal.model.encoders.vision import CLIPEncoder, Dinov2Encoder  # isort: skip

__all__ = [
    "ENCODERS",
    "CLAPEncoder",
    "CLIPEncoder",
    "Dinov2Encoder",
    "Encoder",
    "IMU2CLIPEncoder",
    "IdentityEncoder",
    "VideoMAEEncoder",
    "build_encoder",
    "load_weights",
    "register_encoder",
    "seeded_encoder",
]
