"""Images: a grid of tiles at the encoder's resolution (AnyMAL section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from megatron_anymal.config import DEFAULT_LIMITS, LimitsConfig, ModalityConfig
from megatron_anymal.modalities.base import Modality, require_above
from megatron_anymal.modalities.jpeg_headers import plain_size
from megatron_anymal.modalities.pictures import decoded, opened, orientation_and_size, require_decodable
from megatron_anymal.modalities.pixels import PixelTransform
from megatron_anymal.modalities.registry import register


@dataclass
class ImageOptions:
    """Options of the image modality."""

    # Maximum number of tiles along a side. 1: every image is a single tile at the encoder's resolution.
    max_grid: int = 4
    # If an image is cut into several tiles, prepend the whole image at the encoder's resolution as a further piece.
    overview: bool = True
    # Side of a tile in pixels. 0: the encoder's resolution.
    resolution: int = 0
    # Mean per channel on the scale 0 to 1. None: that of the encoder's folder, else the default of its type.
    image_mean: list[float] | None = None
    # Standard deviation per channel, likewise.
    image_std: list[float] | None = None


@register("image")
class ImageModality(Modality):
    """An image as tiles [3, R, R] in row-major order, where R is the encoder's resolution.

    The image is stretched to N*R x N*R, where N is the smallest integer with N*R >= its longest side, but at most
    `max_grid`.

    Raises:
        ConfigError: an option is out of range, or does not fit the encoder.
    """

    extensions: ClassVar[tuple[str, ...]] = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm")
    Options: ClassVar[type] = ImageOptions
    needs_torch: ClassVar[bool] = False
    pieces_grow_with_size: ClassVar[bool] = True

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__(config)
        require_above(self.options, max_grid=0)
        self.pixels = PixelTransform(
            config.encoder, self.options.resolution, self.options.image_mean, self.options.image_std
        )

    @classmethod
    def probe(
        cls, data: bytes, extension: str, attributes: Mapping[str, Any], limits: LimitsConfig = DEFAULT_LIMITS
    ) -> tuple[float, float]:
        """Width and height in pixels of the upright image.

        Raises:
            MediaError: unreadable, or beyond a limit.
        """
        size = plain_size(data)
        if size is None:
            with opened(data, limits) as picture:
                _, size = orientation_and_size(picture)
        else:
            require_decodable(size, "JPEG", len(data), limits)
        return float(size[0]), float(size[1])

    def _grid(self, sizes: np.ndarray) -> np.ndarray:
        sides = np.ceil(sizes.max(axis=1) / self.pixels.resolution)
        return np.clip(sides, 1, self.options.max_grid).astype(np.int64)

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """N*N tiles, plus the overview if N > 1: [n] int64, from [n, 2] widths and heights."""
        grid = self._grid(sizes)
        return grid * grid + (self.options.overview & (grid > 1))

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """[3, R, R]."""
        return (3, self.pixels.resolution, self.pixels.resolution)

    def decode(self, data: bytes, extension: str, attributes: Mapping[str, Any], pieces: int) -> np.ndarray:
        """Tiles of the image, [pieces, 3, R, R] float32.

        Raises:
            MediaError: the file is corrupt or truncated.
        """
        side = self.pixels.resolution
        with opened(data, self.limits) as picture:
            rgb = decoded(picture, data)
        grid = int(self._grid(np.array([rgb.size], dtype=np.float64))[0])
        whole = self.pixels.resize(rgb, grid)
        tiles = whole.reshape(grid, side, grid, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        if grid > 1 and self.options.overview:
            tiles = np.concatenate([self.pixels.resize(rgb)[None], tiles])
        return self.pixels.normalise(tiles)
