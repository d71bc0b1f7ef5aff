"""Media of questions as a browser receives them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Optional

import numpy as np

from megatron_anymal.config import DEFAULT_LIMITS
from megatron_anymal.data.records import MediaPart
from megatron_anymal.modalities.imu_files import read_signal

# The types that browsers show; everything else is sent as bytes, so that a file with another content cannot become a
# page of this origin.
CONTENT_TYPES = {
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "mp4": "video/mp4",
    "mov": "video/mp4",
    "webm": "video/webm",
    "mkv": "video/x-matroska",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "m4a": "audio/mp4",
    "aac": "audio/aac",
}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
# Points of a curve; more would not be visible.
_POINTS = 600


class NotSatisfiable(ValueError):
    """A byte range that lies outside the file."""


def content_type(path: Path) -> str:
    """The Content-Type of a media file, by its extension."""
    return CONTENT_TYPES.get(path.suffix.lstrip(".").lower(), "application/octet-stream")


def byte_range(header: Optional[str], size: int) -> Optional[tuple[int, int]]:
    """First byte and end of the range that a Range header asks for; None if the whole file is to be sent.

    Several ranges and other units are ignored, as RFC 9110 (section 14.2) allows.

    Raises:
        NotSatisfiable: the range begins after the file's end.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= size:
        raise NotSatisfiable(f"bytes {start} to {end} of {size}")
    return start, end


def curves(part: MediaPart, base: Path) -> dict[str, Any]:
    """An IMU recording for drawing: rate in Hz, length in seconds, and six rows of at most 600 values.

    Raises:
        MediaError: the file cannot be read.
    """
    path, limits = base / part.media, DEFAULT_LIMITS
    signal = read_signal(
        path.read_bytes(), path.suffix.lstrip(".").lower(), part.attributes, limits, limits.max_seconds
    )
    values = signal.values[:: max(1, -(-len(signal.values) // _POINTS))]
    return {
        "rate": round(signal.rate, 3),
        "seconds": round(signal.rows / signal.rate, 3),
        "values": np.round(values.T, 4).tolist(),
    }
