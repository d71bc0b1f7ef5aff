"""Number of frames that a decoder may hold, from the standards' tables and from streams that encoders wrote."""

from __future__ import annotations

import gc
import io
from pathlib import Path

import av
import pytest
from media import CLIP_SHAPE, coded_video, section, video_bytes, with_matrix

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities import build_modality
from megatron_anymal.modalities.base import MediaError
from megatron_anymal.modalities.video import VideoModality
from megatron_anymal.modalities.video_memory import frames_held


def avcc(level: int) -> bytes:
    return bytes([1, 100, 0, level, 255])


def hvcc(level: int) -> bytes:
    return bytes([1, 2, *bytes(10), level, 240])


@pytest.mark.parametrize(
    ("codec", "header", "size", "held"),
    [
        # H.264, A.3.1: MaxDpbMbs / macroblocks. Level 4: 32,768 / 8,160; level 5.1: 184,320 / 32,400.
        ("h264", avcc(40), (1920, 1080), 4),
        ("h264", avcc(51), (3840, 2160), 5),
        ("h264", avcc(60), (4096, 2160), 16),
        ("h264", avcc(10), (640, 480), 1),
        # H.265, A.4.2: 6 frames at the level's full size; 8, 12 and 16 at 3/4, 1/2 and 1/4 of it.
        ("hevc", hvcc(153), (4096, 2176), 6),
        ("hevc", hvcc(153), (3072, 2176), 8),
        ("hevc", hvcc(153), (2048, 2176), 12),
        ("hevc", hvcc(153), (1920, 1080), 16),
        # A missing or unknown level.
        ("h264", b"", (1920, 1080), 16),
        ("h264", avcc(99), (1920, 1080), 16),
        ("hevc", b"\0\0\0\1\x40", (1920, 1080), 16),
        ("vp9", b"", (3840, 2160), 8),
        ("of a new kind", b"", (3840, 2160), 16),
    ],
)
def test_frames_held(codec: str, header: bytes, size: tuple[int, int], held: int) -> None:
    assert frames_held(codec, header, *size) == held


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("references", [1, 4, 9])
def test_an_encoders_level_allows_its_references(codec: str, references: int, tmp_path: Path) -> None:
    """The level that an encoder states allows the number of reference frames it was asked to use."""
    data = coded_video(tmp_path, codec, "yuv420p", 640, 480, references, 2)
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        header = bytes(context.extradata)
        assert references <= frames_held(context.codec.canonical_name, header, 640, 480)


def test_the_estimate_is_refused_by_name() -> None:
    data = video_bytes(10)
    # 64 x 48 pixels, 1.5 bytes each, 16 reference frames at level 1.
    decoding = int(64 * 48 * (1.06 * 1.5 * (16 + 3) + 20))
    VideoModality.probe(data, "mp4", {}, LimitsConfig(max_load_bytes=len(data) + decoding))
    with pytest.raises(MediaError, match=rf"has {len(data)} bytes and takes up to {decoding} more to decode, above"):
        VideoModality.probe(data, "mp4", {}, LimitsConfig(max_load_bytes=len(data) + decoding - 1))


def test_frames_are_freed_without_the_garbage_collector() -> None:
    """Reading a display matrix must not keep its frame alive: large frames would accumulate."""
    modality = build_modality("video", section("clip", CLIP_SHAPE))
    data = with_matrix(video_bytes(30), (0, 1, -1, 0))
    gc.collect()
    gc.disable()
    try:
        modality.load(data, "mp4", {})
        left = [thing for thing in gc.get_objects() if isinstance(thing, av.VideoFrame)]
    finally:
        gc.enable()
    assert not left
