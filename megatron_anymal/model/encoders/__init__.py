"""Encoders: media pieces to features. Architectures come from transformers; IMU2CLIP's kind is written here."""

from megatron_anymal.model.encoders.base import (
    ENCODERS,
    Encoder,
    build_encoder,
    load_weights,
    register_encoder,
)

from megatron_anymal.model.encoders import audio, identity, imu, video, vision  # noqa: F401  # isort: skip

__all__ = ["ENCODERS", "Encoder", "build_encoder", "load_weights", "register_encoder"]
