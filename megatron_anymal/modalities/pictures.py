"""Decoding of image files to upright 8-bit RGB."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities.base import MediaError, reason, require_loadable, require_within
from megatron_anymal.modalities.libraries import library

if TYPE_CHECKING:
    from PIL import Image

# Formats are detected by content, not by file name; GIF files often have the extension of another format.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
# Maximum bytes per pixel while decoding, measured with all of Pillow's modes for each format.
DECODING = {"WEBP": 17.3, "JPEG": 12.5, "MPO": 12.5, "TIFF": 12.5}
USUAL_DECODING = 10.0
# The limit of the JPEG format. For longer sides, Pillow's resize filters take more memory than the image.
LONGEST_SIDE = 65_535
# A 16-bit image whose maximum is below this contains unscaled 12-bit data, which would come out almost black.
DARKEST_PEAK = 1 << 12
# Pixels processed at a time.
STRIP_PIXELS = 2**20

ORIENTATION, IMAGE_WIDTH, IMAGE_LENGTH, BITS_PER_SAMPLE, SAMPLE_FORMAT = 0x0112, 256, 257, 258, 339
# EXIF orientation to the name of Pillow's transposition.
TRANSPOSITIONS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
SWAPS_SIDES = (5, 6, 7, 8)


class _NoBombCheck:
    """Disables Pillow's own pixel limit while files are read; `data.limits.max_pixels` is checked instead.

    Pillow's limit is a global variable; it is restored when the last thread has finished.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._usual: int | None = None

    def __enter__(self) -> None:
        pillow = library("PIL.Image")
        with self._lock:
            if self._users == 0:
                self._usual, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                library("PIL.Image").MAX_IMAGE_PIXELS = self._usual


_no_bomb_check = _NoBombCheck()


@contextmanager
def opened(data: bytes, limits: LimitsConfig) -> Iterator[Image.Image]:
    """Open the image in `data` without decoding its pixels.

    Raises:
        MediaError: the data is not a readable still image or exceeds a limit. Errors in the body of the `with`
            statement are converted as well.
    """
    pillow = library("PIL.Image")
    if not data:
        raise MediaError("is empty (0 bytes)")
    try:
        with _no_bomb_check, pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
            require_decodable(picture.size, picture.format or "", len(data), limits)
            # A camera's MPO file is a JPEG followed by further views; the first one is the image.
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":
                raise MediaError(f"has {frames} frames, but an image must have one: convert it, or make it a video")
            yield picture
    except MediaError:
        raise
    except pillow.UnidentifiedImageError as error:
        raise MediaError(f"cannot be decoded as an image: it is damaged, or not one of {', '.join(FORMATS)}") from error
    # Decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on damaged files.
    except Exception as error:
        raise MediaError(f"cannot be decoded as an image: {reason(error)}") from error


def require_decodable(size: tuple[int, int], form: str, file_bytes: int, limits: LimitsConfig) -> None:
    """Refuse an image that is too large.

    Args:
        size: width and height in pixels.
        form: Pillow's name of the format.
        file_bytes: size of the file.

    Raises:
        MediaError: it has no pixels, or exceeds a limit.
    """
    width, height = size
    if min(width, height) < 1:
        raise MediaError("has no pixels")
    what = f"has {width * height} pixels ({width} x {height})"
    require_within(limits, "max_pixels", width * height, what, "scale it down")
    if max(width, height) > LONGEST_SIDE:
        raise MediaError(f"{what}; no side may be longer than {LONGEST_SIDE}: cut it")
    require_loadable(limits, file_bytes, width * height * DECODING.get(form, USUAL_DECODING))


def orientation_and_size(picture: Image.Image) -> tuple[int, tuple[int, int]]:
    """The EXIF orientation to undo after decoding, and the width and height in pixels of the upright image."""
    if picture.format == "TIFF":
        # Pillow rotates TIFF images on decoding; whether `size` is rotated before that depends on its version.
        tags: Any = picture.tag_v2  # type: ignore[attr-defined]
        stated, (width, height) = tags.get(ORIENTATION), (tags[IMAGE_WIDTH], tags[IMAGE_LENGTH])
        return 1, (height, width) if stated in SWAPS_SIDES else (width, height)
    stated = picture.getexif().get(ORIENTATION)
    orientation = stated if stated in TRANSPOSITIONS else 1
    width, height = picture.size
    return orientation, (height, width) if orientation in SWAPS_SIDES else (width, height)


def _bits(picture: Image.Image, data: bytes) -> int:
    """Bits per sample as stated in the file; 8 for formats that support only 8.

    Raises:
        MediaError: the samples are floating-point, signed or wider than 16 bits, so their range is unknown.
    """
    bits = 8
    if picture.format == "PNG":
        # IHDR is the first chunk of every PNG.
        bits = data[24]
    elif picture.format == "TIFF":
        tags: Any = picture.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(BITS_PER_SAMPLE, (1,)))
        if set(tags.get(SAMPLE_FORMAT, (1,))) != {1}:
            bits = 32
    elif picture.mode.startswith("I"):
        # Pillow scales PGM samples of any range to 16 bits.
        bits = 16
    if picture.mode == "F" or bits > 16:
        raise MediaError(
            f"has floating-point, signed or 32-bit samples (mode {picture.mode}), whose range is unknown: store 8- or "
            "16-bit ones"
        )
    return bits


def decoded(picture: Image.Image, data: bytes) -> Image.Image:
    """Decode an image from `opened` to upright 8-bit RGB (see `flat_and_upright`).

    Raises:
        MediaError: the range of the samples is unknown, or 16-bit samples use less than 12 bits of it.
    """
    bits = _bits(picture, data)
    orientation, _ = orientation_and_size(picture)
    picture.load()
    if bits == 16:
        _require_full_range(picture)
    if picture.format == "PNG" and "transparency" in picture.info:
        picture.info["transparency"] = _transparent_colour(picture.info["transparency"], picture.mode, bits)
    return flat_and_upright(picture, orientation, bits)


def flat_and_upright(picture: Image.Image, orientation: int = 1, bits: int = 8) -> Image.Image:
    """Convert a decoded image to upright 8-bit RGB.

    Transparent images are composited over white. 16-bit greyscale keeps its 8 highest bits. The image is processed in
    strips, so that the intermediate results (up to 12 bytes per pixel) never exist for the whole image.

    Args:
        orientation: EXIF orientation to undo.
        bits: bits per sample of a 16-bit greyscale image (Pillow's modes that begin with "I").
    """
    pillow = library("PIL.Image")
    if picture.mode == "RGB" and orientation == 1 and picture.info.get("transparency") is None:
        return picture
    width, height = reversed(picture.size) if orientation in SWAPS_SIDES else picture.size
    upright = pillow.new("RGB", (width, height))
    name = TRANSPOSITIONS.get(orientation)
    step = max(1, STRIP_PIXELS // width)
    for upper in range(0, height, step):
        lower = min(upper + step, height)
        flat = _flat(picture.crop(_source_box(orientation, width, height, upper, lower)), bits)
        upright.paste(flat.transpose(pillow.Transpose[name]) if name else flat, (0, upper))
    return upright


def _source_box(orientation: int, width: int, height: int, upper: int, lower: int) -> tuple[int, int, int, int]:
    """The box in the stored image that contains the rows `upper` to `lower` of the upright image (width x height)."""
    first, last = (upper, lower) if orientation in (1, 2, 5, 6) else (height - lower, height - upper)
    return (first, 0, last, width) if orientation in SWAPS_SIDES else (0, first, width, last)


def _flat(region: Image.Image, bits: int) -> Image.Image:
    pillow = library("PIL.Image")
    transparent = region.info.get("transparency")
    if region.mode.startswith("I"):
        values = np.asarray(region)
        grey = (values >> (bits - 8)).astype(np.uint8)
        if transparent is not None:
            grey[values == transparent] = 255
        return pillow.fromarray(grey).convert("RGB")
    if "A" in region.getbands() or transparent is not None:
        region = region.convert("RGBA")
        white = pillow.new("RGBA", region.size, (255, 255, 255, 255))
        region = pillow.alpha_composite(white, region)
    return region.convert("RGB")


def _require_full_range(picture: Image.Image) -> None:
    """Refuse 16-bit samples that use fewer bits: the file does not state their scale, so they would come out too dark.

    Raises:
        MediaError: the brightest sample is below 1/16 of the range; an all-black image is accepted.
    """
    deep = picture.mode.startswith("I")
    extrema: Any = picture.getextrema()
    bands = [extrema] if deep or len(picture.getbands()) == 1 else extrema
    brightest = max(high for (_, high), band in zip(bands, picture.getbands()) if band != "A")
    # Pillow keeps only the high byte of 16-bit colours, so black is indistinguishable from 8-bit values in 16 bits.
    if (0 < brightest < DARKEST_PEAK) if deep else brightest < DARKEST_PEAK >> 8:
        raise MediaError(
            "has 16-bit samples that use less than 12 bits (the brightest is below 1/16 of the range): scale them to "
            "the full range, or store 8-bit samples"
        )


def _transparent_colour(stated: Any, mode: str, bits: int) -> Any:
    """Convert a PNG's transparent colour to the scale of Pillow's pixels; Pillow leaves it on the scale of the file."""
    if bits == 16 and isinstance(stated, tuple):
        return tuple(value >> 8 for value in stated)
    if mode == "L" and bits in (2, 4) and isinstance(stated, int):
        return stated * 255 // (2**bits - 1)
    return stated
