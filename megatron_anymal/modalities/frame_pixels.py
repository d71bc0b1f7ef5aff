"""Decoded video frames as upright RGB pixels."""

from __future__ import annotations

import struct
import threading
from functools import cache
from typing import Any

import numpy as np

from megatron_anymal.modalities.base import MediaError
from megatron_anymal.modalities.libraries import library
from megatron_anymal.modalities.pictures import flat_and_upright

# Signs of the linear part of a display matrix, (a, b, c, d) in x' = ax + cy and y' = bx + dy -> EXIF orientation.
DISPLAYED = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}
# Entries of the display matrix below this share of the largest one count as zero.
ROUNDING = 1e-3
# The first PyAV whose converter can be shared by frames of different colour spaces; it starts a thread per core unless
# told not to.
_SHARED_CONVERTER = 17
_own = threading.local()


def frame_pixels(frame: Any) -> np.ndarray:
    """Convert a frame to RGB over white, rotated and mirrored according to its display matrix (phone videos).

    Args:
        frame: an av.VideoFrame.

    Returns:
        The upright frame, [height, width, 3] uint8.

    Raises:
        MediaError: the rotation is not a multiple of 90 degrees, or the display matrix is singular.
    """
    orientation = _orientation(frame)
    if frame.format.name == "yuva420p":
        # FFmpeg's conversion to RGBA leaves columns of some widths unwritten.
        stored = np.dstack([_rgb(frame), _plane(frame.planes[3])])
    elif frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components):
        stored = frame.to_ndarray(format="rgba")
    else:
        stored = _rgb(frame)
        if orientation == 1:
            return stored
    return np.asarray(flat_and_upright(library("PIL.Image").fromarray(stored), orientation))


def _rgb(frame: Any) -> np.ndarray:
    """The stored frame as RGB; what is set up for a size and format is kept for the thread's next frame."""
    if _pyav_version() < _SHARED_CONVERTER:
        return frame.to_ndarray(format="rgb24")
    if not hasattr(_own, "converter"):
        _own.converter = library("av.video.reformatter").VideoReformatter()
    return _own.converter.reformat(frame, format="rgb24", threads=1).to_ndarray()


@cache
def _pyav_version() -> int:
    return int(library("av").__version__.partition(".")[0])


def _plane(plane: Any) -> np.ndarray:
    """Samples of a plane of 8 bits, [height, width] uint8."""
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[: plane.height, : plane.width]


def _orientation(frame: Any) -> int:
    """Convert the frame's display matrix to an EXIF orientation.

    Raises:
        MediaError: the rotation is not a multiple of 90 degrees, or the matrix is singular.
    """
    # frame.side_data would create a reference cycle, which keeps the pixels alive until the garbage collector runs.
    matrix = library("av.sidedata.sidedata").SideDataContainer(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return 1
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    largest = max(abs(entry) for entry in (a, b, c, d))
    signs = tuple(0 if abs(entry) <= ROUNDING * largest else (1 if entry > 0 else -1) for entry in (a, b, c, d))
    if signs not in DISPLAYED:
        raise MediaError("has a rotation that is not a multiple of 90 degrees: convert it to upright frames")
    return DISPLAYED[signs]
