"""A fifth modality in one file: thermal images with their own encoder.

A thermal image has one float per pixel, in degrees Celsius, and is stored as an npy array [height, width] in a file
named `KEY.thermal.npy`. The package itself is unchanged. Enable the modality with

    model.plugins=[examples/thermal_modality.py]

and a section in the configuration:

    model:
      modalities:
        thermal:
          encoder: {type: thermal_patches, config: {width: 64}, freeze: false}
          projector: {type: linear, num_layers: 1, num_tokens: 8}
          options: {resolution: 64}
          placeholder: "<|reserved_special_token_7|>"

The encoder starts from random weights, so it is trained with its projector (`freeze: false`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from megatron_anymal.config import DEFAULT_LIMITS, ConfigError, EncoderConfig, LimitsConfig, ModalityConfig
from megatron_anymal.modalities import MediaError, Modality, register
from megatron_anymal.modalities.base import parse_options, require_above, require_within
from megatron_anymal.model.encoders import Encoder, load_weights, register_encoder


@dataclass
class ThermalOptions:
    """Options of the thermal modality."""

    # Side of the encoder's square input image, in pixels.
    resolution: int = 64
    # Degrees Celsius mapped to 0 and 1.
    coldest: float = -20.0
    hottest: float = 60.0


@register("thermal")
class ThermalModality(Modality):
    """Each thermal image is one encoder input (piece) [1, R, R]."""

    extensions: ClassVar[tuple[str, ...]] = ("thermal.npy",)
    Options: ClassVar[type] = ThermalOptions
    pieces_grow_with_size: ClassVar[bool] = True

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__(config)
        require_above(self.options, resolution=0, hottest=self.options.coldest)

    @staticmethod
    def read(data: bytes) -> np.ndarray:
        """Read an image in degrees Celsius, [height, width] float32."""
        try:
            picture = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise MediaError(f"cannot be read as an npy array: {error}") from error
        if picture.ndim != 2 or picture.size == 0 or picture.dtype.kind not in "fiu":
            raise MediaError(f"is a {picture.dtype} array of shape {list(picture.shape)}, not numeric [height, width]")
        return picture.astype(np.float32)

    @classmethod
    def probe(
        cls, data: bytes, extension: str, attributes: Mapping[str, Any], limits: LimitsConfig = DEFAULT_LIMITS
    ) -> tuple[float, float]:
        """Width and height in pixels."""
        height, width = cls.read(data).shape
        what = f"has {width * height} pixels ({width} x {height})"
        require_within(limits, "max_pixels", width * height, what, "scale it down")
        return float(width), float(height)

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """One piece per image."""
        return np.ones(len(sizes), dtype=np.int64)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """[1, R, R]."""
        return (1, self.options.resolution, self.options.resolution)

    def decode(self, data: bytes, extension: str, attributes: Mapping[str, Any], pieces: int) -> np.ndarray:
        """Return the image resized and scaled to 0..1, [1, 1, R, R]."""
        picture = torch.from_numpy(self.read(data))[None, None]
        scaled = (picture - self.options.coldest) / (self.options.hottest - self.options.coldest)
        size = (self.options.resolution, self.options.resolution)
        return nn.functional.interpolate(scaled, size=size, mode="bilinear", antialias=True).numpy()


@dataclass
class ThermalShape:
    """Keys of `encoder.config`."""

    width: int = 64
    patch_size: int = 8


@register_encoder("thermal_patches")
class ThermalEncoder(Encoder):
    """Patch convolution and two-layer perceptron: [1, R, R] to (R / patch)^2 features."""

    def __init__(self, config: EncoderConfig, piece_shape: tuple[int, ...]) -> None:
        super().__init__(config, piece_shape)
        shape: ThermalShape = parse_options(ThermalShape, config.config, "encoder.config")
        require_above(shape, "encoder.config", width=0, patch_size=0)
        if piece_shape[0] != 1 or piece_shape[1] % shape.patch_size:
            raise ConfigError(f"encoder.config.patch_size={shape.patch_size} does not divide the input {piece_shape}.")
        self.width = shape.width
        self.feature_tokens = (piece_shape[1] // shape.patch_size) ** 2
        self.patches = nn.Conv2d(1, shape.width, shape.patch_size, stride=shape.patch_size)
        self.perceptron = nn.Sequential(
            nn.GELU(), nn.Linear(shape.width, shape.width), nn.GELU(), nn.Linear(shape.width, shape.width)
        )
        if config.path:
            load_weights(self, config)

    def forward(self, pieces: Tensor) -> Tensor:
        """[n, 1, R, R] to [n, feature_tokens, width]."""
        return self.perceptron(self.patches(pieces.to(self.dtype)).flatten(2).transpose(1, 2))

    def flops_per_piece(self) -> float:
        """2 x tokens x weights."""
        weights = sum(parameter.numel() for parameter in self.parameters() if parameter.ndim > 1)
        return 2.0 * self.feature_tokens * weights
