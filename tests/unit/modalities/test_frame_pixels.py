"""Frames become RGB pictures whatever their size and pixel format, and whatever was converted before."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from megatron_anymal.modalities.frame_pixels import frame_pixels

SIZES = ((32, 32), (33, 17), (322, 182), (64, 2), (854, 48))
FORMATS = ("yuv420p", "nv12", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "gray", "bgr24", "rgb24")


def noise(width: int, height: int, pixels: str, seed: int = 0) -> av.VideoFrame:
    rng = np.random.default_rng(seed)
    frame = av.VideoFrame(width, height, pixels)
    for plane in frame.planes:
        # Two bytes a sample: the upper one is within 10 bits.
        plane.update(rng.integers(0, 4 if "10" in pixels else 256, plane.buffer_size, dtype=np.uint8).tobytes())
    return frame


def mixed() -> list[av.VideoFrame]:
    """Frames that differ from their neighbours in format, and within a format in size and colour space."""
    frames = [noise(*size, pixels) for size in SIZES for pixels in FORMATS]
    for number, frame in enumerate(frames):
        frame.colorspace, frame.color_range = (1, 5, 9)[number % 3], number % 2 + 1
    return frames


def test_frames_equal_those_converted_alone() -> None:
    frames = mixed()
    expected = [np.asarray(frame.to_image()) for frame in frames]
    for _ in range(2):
        for frame, alone in zip(frames, expected):
            np.testing.assert_array_equal(frame_pixels(frame), alone, err_msg=str(frame))


def test_no_thread_is_started_for_a_frame() -> None:
    frame = noise(320, 240, "yuv420p")

    def started() -> int:
        before = len(os.listdir("/proc/self/task"))
        frame_pixels(frame)
        return len(os.listdir("/proc/self/task")) - before

    # In a thread that has not converted anything yet.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(started).result() == 0


@pytest.mark.parametrize("width", [*range(16, 34), 322, 500])
def test_every_column_of_a_transparent_frame(width: int) -> None:
    frame = av.VideoFrame(width, 4, "yuva420p")
    # An opaque, then a half transparent grey.
    for plane, value in zip(frame.planes, (126, 128, 128, 255)):
        plane.update(bytes([value]) * plane.buffer_size)
    frame.planes[3].update(bytes([255]) * frame.planes[3].line_size * 2 + bytes([128]) * frame.planes[3].line_size * 2)
    picture = frame_pixels(frame).astype(int)
    assert picture.shape == (4, width, 3)
    # BT.601 of limited range: (126 - 16) * 255 / 219 = 128.
    assert np.abs(picture[:2] - 128).max() <= 1
    assert np.abs(picture[2:] - (128 * 128 + 255 * 127) / 255).max() <= 1
