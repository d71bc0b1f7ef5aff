"""Real photographs, from scikit-learn, and Pillow's plain way from a file to encoder input."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import sklearn.datasets
from media import image_bytes
from PIL import Image, ImageOps

NAMES = ("china.jpg", "flower.jpg")


def photo(name: str) -> Image.Image:
    """An RGB photograph, 640 x 427."""
    return Image.open(Path(sklearn.datasets.__file__).parent / "images" / name).convert("RGB")


def oriented(picture: Image.Image, kind: str, orientation: int = 1, **arguments: object) -> bytes:
    """The picture as a file with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image_bytes(picture, kind, exif=exif, **arguments)


def flat(data: bytes) -> Image.Image:
    """Upright RGB over white."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert picture is not None
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def tiles_of(picture: Image.Image, side: int, grid: int) -> np.ndarray:
    """Overview and tiles, [1 + grid * grid, side, side, 3] uint8; only the overview if grid is 1."""
    size = (grid * side, grid * side)
    whole = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    rows = [whole[y : y + side, x : x + side] for y in range(0, size[0], side) for x in range(0, size[0], side)]
    overview = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
    return np.stack(rows if grid == 1 else [overview, *rows])


def normalised(pixels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """[n, height, width, 3] uint8 to [n, 3, height, width] float32."""
    scaled = (pixels.astype(np.float32) * np.float32(1 / 255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
