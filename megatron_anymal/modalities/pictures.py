"""Still pictures as upright 8-bit RGB: which files are read, and what their pixels mean."""

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

# Formats by content, whatever the file's name says; GIF is common under the names of others.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
# Bytes a pixel that decoding takes at most: measured with every mode that Pillow has for a format.
DECODING = {"WEBP": 17.3, "JPEG": 12.5, "MPO": 12.5, "TIFF": 12.5}
USUAL_DECODING = 10.0
# JPEG's own bound. Pillow's filters for a longer side take more memory than the picture.
LONGEST_SIDE = 65_535
# A 16-bit picture that stays below this is 12-bit data that nobody scaled: it would come out almost black.
DARKEST_PEAK = 1 << 12
# Pixels that are worked on at once.
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
    """Switches Pillow's own pixel limit off while files are read: `data.limits.max_pixels` is checked instead.

    Pillow's limit is one variable of the process; it is put back when the last of several threads has finished.
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
    """The picture in `data`, its pixels not yet decoded.

    Raises:
        MediaError: not a readable still picture, or beyond a limit; raised also for errors while the body uses it.
    """
    pillow = library("PIL.Image")
    if not data:
        raise MediaError("is empty (0 bytes)")
    try:
        with _no_bomb_check, pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
            _require_size(picture, limits)
            pixels = picture.size[0] * picture.size[1]
            require_loadable(limits, len(data), pixels * DECODING.get(picture.format or "", USUAL_DECODING))
            # A camera's MPO is a JPEG with further views behind it; the first is the picture.
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":
                raise MediaError(f"holds {frames} frames; an image has one: convert it, or make it a video")
            yield picture
    except MediaError:
        raise
    except pillow.UnidentifiedImageError as error:
        raise MediaError(f"cannot be decoded as an image: it is damaged, or none of {', '.join(FORMATS)}") from error
    # Decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on damaged files.
    except Exception as error:
        raise MediaError(f"cannot be decoded as an image: {reason(error)}") from error


def _require_size(picture: Image.Image, limits: LimitsConfig) -> None:
    width, height = picture.size
    if min(width, height) < 1:
        raise MediaError("has no pixels")
    what = f"has {width * height} pixels ({width} x {height})"
    require_within(limits, "max_pixels", width * height, what, "scale it down")
    if max(width, height) > LONGEST_SIDE:
        raise MediaError(f"{what}; no side may be longer than {LONGEST_SIDE}: cut it")


def orientation_and_size(picture: Image.Image) -> tuple[int, tuple[int, int]]:
    """The EXIF orientation that decoding leaves to be undone, and width and height in pixels as seen upright."""
    if picture.format == "TIFF":
        # Pillow turns a TIFF when it decodes one; some versions state its turned size before that, others do not.
        tags: Any = picture.tag_v2  # type: ignore[attr-defined]
        stated, (width, height) = tags.get(ORIENTATION), (tags[IMAGE_WIDTH], tags[IMAGE_LENGTH])
        return 1, (height, width) if stated in SWAPS_SIDES else (width, height)
    stated = picture.getexif().get(ORIENTATION)
    orientation = stated if stated in TRANSPOSITIONS else 1
    width, height = picture.size
    return orientation, (height, width) if orientation in SWAPS_SIDES else (width, height)


def _bits(picture: Image.Image, data: bytes) -> int:
    """Bits of a sample as the file states them; 8 for formats that have no other.

    Raises:
        MediaError: floating-point, signed or wider than 16-bit samples, whose range is unknown.
    """
    bits = 8
    if picture.format == "PNG":
        # IHDR comes first in every PNG.
        bits = data[24]
    elif picture.format == "TIFF":
        tags: Any = picture.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(BITS_PER_SAMPLE, (1,)))
        if set(tags.get(SAMPLE_FORMAT, (1,))) != {1}:
            bits = 32
    elif picture.mode.startswith("I"):
        # Pillow scales a PGM of any range to 16 bits.
        bits = 16
    if picture.mode == "F" or bits > 16:
        raise MediaError(
            f"has floating-point, signed or 32-bit samples (mode {picture.mode}), whose range is unknown: store 8- or "
            "16-bit ones"
        )
    return bits


def decoded(picture: Image.Image, data: bytes) -> Image.Image:
    """Decode a picture that `opened` gave, to upright 8-bit RGB as `flat_and_upright` makes it.

    Raises:
        MediaError: samples whose range is unknown, or 16-bit ones that use less than 12 bits of it.
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
    """A decoded picture as upright 8-bit RGB.

    Transparency is laid over white. Deep grey keeps its 8 highest bits. The work goes strip by strip: what lies
    between, up to three pictures of 4 bytes a pixel, is never there as a whole.

    Args:
        orientation: EXIF orientation to undo.
        bits: of a sample of a deep grey picture (Pillow's modes that begin with "I").
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
    """The box of a picture as stored that holds the rows from `upper` to `lower` of it upright, width x height."""
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
    """Refuse 16-bit samples that hold fewer bits: their scale is not stated, and 16-bit white would be 16 times theirs.

    Raises:
        MediaError: the brightest sample is below 1/16 of the range; exact black is accepted.
    """
    deep = picture.mode.startswith("I")
    extrema: Any = picture.getextrema()
    bands = [extrema] if deep or len(picture.getbands()) == 1 else extrema
    brightest = max(high for (_, high), band in zip(bands, picture.getbands()) if band != "A")
    # Pillow keeps only the high byte of 16-bit colours, so there black cannot be told from 8 bits in 16.
    if (0 < brightest < DARKEST_PEAK) if deep else brightest < DARKEST_PEAK >> 8:
        raise MediaError(
            "has 16-bit samples that use less than 12 bits (the brightest is below 1/16 of the range): scale them to "
            "the full range, or store 8-bit ones"
        )


def _transparent_colour(stated: Any, mode: str, bits: int) -> Any:
    """A PNG's transparent colour on the scale of Pillow's pixels; Pillow leaves it on the file's."""
    if bits == 16 and isinstance(stated, tuple):
        return tuple(value >> 8 for value in stated)
    if mode == "L" and bits in (2, 4) and isinstance(stated, int):
        return stated * 255 // (2**bits - 1)
    return stated
