"""Images: a grid of tiles of the encoder's resolution (AnyMAL section 3.1)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from megatron_anymal.config import ModalityConfig
from megatron_anymal.modalities.base import MediaError, Modality, require_above
from megatron_anymal.modalities.libraries import library
from megatron_anymal.modalities.pixels import PixelTransform, to_rgb, upright_size
from megatron_anymal.modalities.registry import register

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class ImageOptions:
    """Options of the image modality."""

    # Most tiles along a side. 1: every image is one tile of the encoder's resolution.
    max_grid: int = 4
    # Where an image is cut into tiles, the whole image at the encoder's resolution comes first as one more piece.
    overview: bool = True
    # Side of a tile in pixels. 0: the encoder's own.
    resolution: int = 0
    # Channel statistics on the scale 0 to 1. None: those of the encoder's folder, else its type's usual ones.
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """The picture in `data`, its pixels not yet decoded.

    Raises:
        MediaError: not a readable still picture; raised also for errors while the body uses it.
    """
    pillow = library("PIL.Image")
    if not data:
        raise MediaError("is empty (0 bytes)")
    try:
        with pillow.open(io.BytesIO(data)) as picture:
            # A camera's MPO is a JPEG with further views behind it; the first is the picture.
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":
                raise MediaError(f"holds {frames} frames; an image has one: convert it, or make it a video")
            if min(picture.size) < 1:
                raise MediaError("has no pixels")
            yield picture
    except MediaError:
        raise
    # Decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on damaged files.
    except Exception as error:
        raise MediaError(f"cannot be decoded as an image: {error}") from error


@register("image")
class ImageModality(Modality):
    """A still picture as tiles [3, R, R], row by row, R the encoder's resolution.

    The picture is stretched to N*R x N*R, N the smallest with N*R >= its longest side, at most `max_grid`.
    """

    extensions: ClassVar[tuple[str, ...]] = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm")
    Options: ClassVar[type] = ImageOptions

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__(config)
        require_above(self.options, max_grid=0)
        self.pixels = PixelTransform(
            config.encoder, self.options.resolution, self.options.image_mean, self.options.image_std
        )

    @classmethod
    def probe(cls, data: bytes, extension: str, attributes: Mapping[str, Any]) -> tuple[float, float]:
        """Width and height in pixels, upright, from the header alone."""
        with opened(data) as picture:
            width, height = upright_size(picture)
        return float(width), float(height)

    def _grid(self, sizes: np.ndarray) -> np.ndarray:
        sides = np.ceil(sizes.max(axis=1) / self.pixels.resolution)
        return np.clip(sides, 1, self.options.max_grid).astype(np.int64)

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """N*N tiles, and the overview where N > 1."""
        grid = self._grid(sizes)
        return grid * grid + (self.options.overview & (grid > 1))

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """[3, R, R]."""
        return (3, self.pixels.resolution, self.pixels.resolution)

    def decode(self, data: bytes, extension: str, attributes: Mapping[str, Any], pieces: int) -> torch.Tensor:
        """Tiles of the picture, [pieces, 3, R, R] float32."""
        with opened(data) as picture:
            rgb = to_rgb(picture)
        grid = int(self._grid(np.array([rgb.size], dtype=np.float64))[0])
        side = self.pixels.resolution
        whole = self.pixels.resize(rgb, grid)
        tiles = whole.reshape(grid, side, grid, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        if grid > 1 and self.options.overview:
            tiles = np.concatenate([self.pixels.resize(rgb)[None], tiles])
        return torch.from_numpy(self.pixels.normalise(tiles))
