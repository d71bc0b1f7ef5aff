"""Conversion of upright images and video frames to normalised pixel tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.modalities.architecture import ARCHITECTURES, preprocessor, transformers_config
from megatron_anymal.modalities.base import MediaError, Modality, nearest
from megatron_anymal.modalities.libraries import library
from megatron_anymal.modalities.resizing import (
    BACKENDS,
    BICUBIC,
    PILLOW_FILTERS,
    TORCH_FILTERS,
    with_pillow,
    with_torch,
)

if TYPE_CHECKING:
    from PIL import Image

# CLIP's and ImageNet's channel statistics, as in transformers.image_utils.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class PixelOptions:
    """Options that images and videos share."""

    # Side of the encoder's square input in pixels. 0: the encoder's resolution.
    resolution: int = 0
    # Mean per channel on the scale 0 to 1. None: that of the encoder's folder, else the default of its type.
    image_mean: list[float] | None = None
    # Standard deviation per channel, likewise.
    image_std: list[float] | None = None
    # What resizes: "pillow", whose pixels CLIP and DINOv2 were trained with; or "torch", five times as fast and up to
    # two grey levels off (modalities/resizing.py), which also decodes JPEG with simplejpeg.
    resize_backend: str = "pillow"


class PixelTransform:
    """Resizes to the encoder's square input and normalises with the statistics of its training.

    Resolution, statistics and resize filter come from the encoder's folder; `options` overrides them.

    Raises:
        ConfigError: the encoder's preprocessor is not supported, its resolution is unknown, or an option is out of
            range.
    """

    def __init__(self, encoder: EncoderConfig, options: PixelOptions) -> None:
        described = preprocessor(encoder, "image_processor")
        if described.get("do_rescale", True) is False or abs(described.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise ConfigError(f"The preprocessor of {encoder.path!r} does not rescale pixels by 1/255: not supported.")
        self.resolution = options.resolution or self._encoder_resolution(encoder)
        if self.resolution < 1:
            raise ConfigError(f"options.resolution={options.resolution} must be at least 1 (0 takes the encoder's).")
        default = (CLIP_MEAN, CLIP_STD) if encoder.type == "clip" else (IMAGENET_MEAN, IMAGENET_STD)
        if described.get("do_normalize", True) is False:
            default = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.mean = self._channels("image_mean", options.image_mean or described.get("image_mean") or default[0])
        self.std = self._channels("image_std", options.image_std or described.get("image_std") or default[1])
        if (self.std <= 0).any():
            raise ConfigError("options.image_std must be above 0 in every channel.")
        self.resample = described.get("resample", BICUBIC)
        if self.resample not in PILLOW_FILTERS:
            raise ConfigError(
                f"The preprocessor of {encoder.path!r} states the filter {self.resample!r}, which Pillow does not have."
            )
        self.backend = self._backend(options.resize_backend)

    def _backend(self, name: str) -> str:
        if name not in BACKENDS:
            raise ConfigError(f"options.resize_backend={name!r} is unknown. {nearest(name, BACKENDS)}")
        if name == "torch" and self.resample not in TORCH_FILTERS:
            raise ConfigError(
                f"options.resize_backend=torch lacks Pillow's filter {self.resample}, which the encoder's preprocessor "
                "states (resample). Set it to pillow."
            )
        return name

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

    def resize(self, picture: Image.Image | np.ndarray, sides: int = 1) -> np.ndarray:
        """Stretch the whole image to `sides` x the resolution, [height, width, 3] uint8.

        Args:
            picture: RGB, an image or [height, width, 3] uint8.
        """
        side = sides * self.resolution
        if self.backend == "torch":
            return with_torch(np.asarray(picture), side, self.resample)
        image = library("PIL.Image").fromarray(picture) if isinstance(picture, np.ndarray) else picture
        return with_pillow(image, side, self.resample)

    def normalise(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Normalise pixels, plane by plane and in place: intermediate results stay in the processor's cache.

        Args:
            pixels: [..., height, width, 3] uint8.
            out: [..., 3, height, width] float32.
        """
        scale = np.float32(1 / 255)
        for index in np.ndindex(pixels.shape[:-3]):
            for channel, (mean, std) in enumerate(zip(self.mean, self.std)):
                plane = out[(*index, channel)]
                plane[...] = pixels[index][..., channel]
                plane *= scale
                plane -= mean
                plane /= std

    def denormalise(self, pixels: np.ndarray) -> np.ndarray:
        """Undo `normalise`: [..., 3, height, width] float32 to [..., height, width, 3] uint8."""
        scaled = (np.moveaxis(pixels, -3, -1) * self.std + self.mean) * 255
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


class PixelModality(Modality):
    """A modality whose `decode` returns 8-bit pixels, [pieces, ..., R, R, 3] instead of [pieces, ..., 3, R, R]."""

    pixels: PixelTransform

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """[..., R, R, 3]."""
        *leading, channels, height, width = self.piece_shape
        return (*leading, height, width, channels)

    def write(self, decoded: np.ndarray, out: np.ndarray) -> None:
        """Normalise pixels; every result is finite.

        Args:
            decoded: [pieces, *decoded_shape] uint8.
            out: [pieces, *piece_shape] float32.

        Raises:
            MediaError: a subclass's `decode` returned something else.
        """
        if decoded.dtype != np.uint8:
            raise MediaError(f"is decoded to {decoded.dtype} by {type(self).__name__}, which must return 8-bit pixels")
        self.pixels.normalise(decoded, out)
