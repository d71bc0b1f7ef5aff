"""Sizes of JPEG files from their headers, for files whose headers leave no question to Pillow.

Pillow takes ten times longer to open a file. It checks the same segments, so a file whose size is found here is one
that Pillow opens and does not rotate; whatever is unusual is left to Pillow.
"""

from __future__ import annotations

from typing import Optional

# ITU-T T.81, table B.1: baseline, extended and progressive frames; tables, restart interval and scan.
_FRAMES = (0xC0, 0xC1, 0xC2)
_HUFFMAN, _QUANTIZATION, _RESTART, _SCAN = 0xC4, 0xDB, 0xDD, 0xDA
_JFIF, _ICC, _ADOBE, _COMMENT = 0xE0, 0xE2, 0xEE, 0xFE
# Of these segments only the length matters, if it is at least the second number (bytes without the length itself).
_PASSED = {_HUFFMAN: 0, _RESTART: 0, _COMMENT: 0, _JFIF: 12, _ADOBE: 12}


def plain_size(data: bytes) -> Optional[tuple[int, int]]:
    """Width and height in pixels of a JPEG file without EXIF, XMP or further views; None if Pillow has to decide."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    size, at = None, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        start, at = at + 4, at + 2 + length
        if length < 2 or at > len(data):
            return None
        if marker == _SCAN:
            return size
        if marker in _FRAMES:
            size = _frame_size(data[start:at])
            is_plain = size is not None
        else:
            is_plain = _is_plain(marker, data, start, at)
        if not is_plain:
            return None
    return None


def _frame_size(frame: bytes) -> Optional[tuple[int, int]]:
    """Width and height of a frame of 8 bits with 1, 3 or 4 components; None if it is another one."""
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3, 4) or len(frame) % 3:
        return None
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    return (width, height) if width and height else None


def _is_plain(marker: int, data: bytes, start: int, stop: int) -> bool:
    """Whether a segment is one that Pillow accepts and that does not change the size."""
    if marker == _QUANTIZATION:
        while start < stop:
            start += 65 if data[start] < 16 else 129
        return start == stop
    if marker == _ICC:
        return stop - start >= 14 and data.startswith(b"ICC_PROFILE\0", start)
    return marker in _PASSED and stop - start >= _PASSED[marker]
