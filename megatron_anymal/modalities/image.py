"""Images: a grid of tiles at the encoder's resolution (AnyMAL section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from megatron_anymal.config import DEFAULT_LIMITS, LimitsConfig, ModalityConfig
from megatron_anymal.modalities.base import require_above
from megatron_anymal.modalities.jpeg import decoded_pixels
from megatron_anymal.modalities.jpeg_headers import plain_size
from megatron_anymal.modalities.pictures import decoded, opened, orientation_and_size, require_decodable
from megatron_anymal.modalities.pixels import PixelModality, PixelOptions, PixelTransform
from megatron_anymal.modalities.registry import register

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class ImageOptions(PixelOptions):
    """Options of the image modality."""

    # Maximum number of tiles along a side. 1: every image is a single tile at the encoder's resolution.
    max_grid: int = 4
    # If an image is cut into several tiles, prepend the whole image at the encoder's resolution as a further piece.
    overview: bool = True


@register("image")
class ImageModality(PixelModality):
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
        self.pixels = PixelTransform(config.encoder, self.options)

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
        """Tiles of the image, [pieces, R, R, 3] uint8.

        Raises:
            MediaError: the file is corrupt or truncated.
        """
        return ImageModality.decode_with_size(self, data, extension, attributes)[1]

    def decode_with_size(
        self, data: bytes, extension: str, attributes: Mapping[str, Any]
    ) -> tuple[tuple[float, float], np.ndarray]:
        """Probe and decode a file, opening it once.

        Returns:
            The result of `probe`, and tiles, [pieces, R, R, 3] uint8.

        Raises:
            MediaError: as `probe` and `decode`.
        """
        with opened(data, self.limits) as picture:
            _, size = orientation_and_size(picture)
            rgb = decoded_pixels(picture, data) if self.pixels.backend == "torch" else decoded(picture, data)
        return size, self._tiles(rgb, int(self._grid(np.array([size], dtype=np.float64))[0]))

    def _tiles(self, rgb: Image.Image | np.ndarray, grid: int) -> np.ndarray:
        side = self.pixels.resolution
        whole = self.pixels.resize(rgb, grid)
        if grid == 1:
            return whole[None]
        tiles = whole.reshape(grid, side, grid, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        return np.concatenate([self.pixels.resize(rgb)[None], tiles]) if self.options.overview else tiles
