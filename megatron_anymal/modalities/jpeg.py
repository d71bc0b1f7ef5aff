"""Decoding of image files to arrays, JPEG with simplejpeg: libjpeg-turbo, as in Pillow, without Pillow's copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_anymal.modalities.libraries import library
from megatron_anymal.modalities.pictures import decoded, orientation_and_size

if TYPE_CHECKING:
    from PIL import Image

# Axes of [height, width, 3] to reverse after swapping the first two, or not, for each EXIF orientation: (swap, axes).
_UPRIGHT = {
    1: (False, ()),
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


def decoded_pixels(picture: Image.Image, data: bytes) -> np.ndarray:
    """Decode an image from `pictures.opened` to upright RGB, [height, width, 3] uint8.

    Raises:
        MediaError, or an error that `opened` converts: as with `pictures.decoded`.
    """
    pixels = _with_simplejpeg(data) if picture.format in ("JPEG", "MPO") and picture.mode in ("L", "RGB") else None
    if pixels is None or pixels.shape != (picture.height, picture.width, 3):
        return np.asarray(decoded(picture, data))
    swap, reversed_axes = _UPRIGHT[orientation_and_size(picture)[0]]
    return np.flip(pixels.swapaxes(0, 1) if swap else pixels, reversed_axes)


def _with_simplejpeg(data: bytes) -> np.ndarray | None:
    """Pixels of a JPEG as stored; None if anything about it is unusual, which is left to Pillow and its errors."""
    try:
        # `strict`: warnings of libjpeg, for example about missing data, are errors.
        return library("simplejpeg").decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None
