"""Conversion of upright images and video frames to normalised pixel tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.modalities.architecture import ARCHITECTURES, preprocessor, transformers_config

if TYPE_CHECKING:
    from PIL import Image

# CLIP's and ImageNet's channel statistics, as in transformers.image_utils.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Pillow's resize filters, by their numbers in preprocessor configurations.
FILTERS, BICUBIC = range(6), 3


class PixelTransform:
    """Resizes to the encoder's square input and normalises with the statistics of its training.

    Resolution, statistics and resize filter come from the encoder's folder; `resolution`, `mean` and `std` override
    them.

    Raises:
        ConfigError: the encoder's preprocessor is not supported, its resolution is unknown, or an option is out of
            range.
    """

    def __init__(
        self, encoder: EncoderConfig, resolution: int, mean: list[float] | None, std: list[float] | None
    ) -> None:
        described = preprocessor(encoder, "image_processor")
        if described.get("do_rescale", True) is False or abs(described.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise ConfigError(f"The preprocessor of {encoder.path!r} does not rescale pixels by 1/255: not supported.")
        self.resolution = resolution or self._encoder_resolution(encoder)
        if self.resolution < 1:
            raise ConfigError(f"options.resolution={resolution} must be at least 1 (0 takes the encoder's).")
        default = (CLIP_MEAN, CLIP_STD) if encoder.type == "clip" else (IMAGENET_MEAN, IMAGENET_STD)
        if described.get("do_normalize", True) is False:
            default = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.mean = self._channels("image_mean", mean or described.get("image_mean") or default[0])
        self.std = self._channels("image_std", std or described.get("image_std") or default[1])
        if (self.std <= 0).any():
            raise ConfigError("options.image_std must be above 0 in every channel.")
        self.resample = described.get("resample", BICUBIC)
        if self.resample not in FILTERS:
            raise ConfigError(
                f"The preprocessor of {encoder.path!r} states the filter {self.resample!r}, which Pillow does not have."
            )

    @staticmethod
    def _encoder_resolution(encoder: EncoderConfig) -> int:
        described: Any = None
        if encoder.type in ARCHITECTURES:
            described = getattr(transformers_config(encoder), "image_size", None)
        else:
            described = encoder.config.get("image_size")
        sides = list(described) if isinstance(described, (list, tuple)) else [described]
        if len(set(sides)) != 1 or not isinstance(sides[0], int):
            raise ConfigError(
                f"encoder.type={encoder.type} states no square image_size ({described}). Set options.resolution, in "
                "pixels, or use an image encoder."
            )
        return sides[0]

    @staticmethod
    def _channels(name: str, values: Any) -> np.ndarray:
        channels = np.asarray(values, dtype=np.float32)
        if channels.shape != (3,):
            raise ConfigError(f"options.{name}={list(values)} must have three values, one per channel.")
        return channels

    def resize(self, picture: Image.Image, sides: int = 1) -> np.ndarray:
        """Stretch the whole image to `sides` x the resolution, [height, width, 3] uint8."""
        side = sides * self.resolution
        return np.asarray(picture.resize((side, side), resample=self.resample))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Normalise [..., height, width, 3] uint8 to [..., 3, height, width] float32."""
        scaled = (pixels.astype(np.float32) * np.float32(1 / 255) - self.mean) / self.std
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))

    def denormalise(self, pixels: np.ndarray) -> np.ndarray:
        """Undo `normalise`: [..., 3, height, width] float32 to [..., height, width, 3] uint8."""
        scaled = (np.moveaxis(pixels, -3, -1) * self.std + self.mean) * 255
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
