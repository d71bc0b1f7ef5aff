"""Loading the worst file within the default limits takes at most 512 MiB of memory in a loader process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from media import coded_video, image_bytes, npy_bytes, sine, sound_bytes, with_matrix
from PIL import Image

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities.base import MediaError
from megatron_anymal.modalities.pictures import DECODING, USUAL_DECODING
from megatron_anymal.modalities.video import VideoModality
from megatron_anymal.modalities.video_memory import decoding_bytes

LIMITS = LimitsConfig()
# The largest square that fits.
SIDE = int(LIMITS.max_pixels**0.5)
BOUND = 512

pytestmark = pytest.mark.slow


def peak_of(kind: str, large: bytes, small: bytes, name: str, folder: Path, **attributes: Any) -> int:
    """Peak MiB for loading `large`; loading `small` of the same kind first loads the libraries."""
    (folder / f"large.{name}").write_bytes(large)
    (folder / f"small.{name}").write_bytes(small)
    script = Path(__file__).with_name("load_peak.py")
    words = [sys.executable, str(script), kind, str(folder / f"large.{name}"), json.dumps(attributes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def palette(side: int) -> bytes:
    picture = Image.new("P", (side, side), 1)
    picture.putpalette(list(range(256)) * 3)
    return image_bytes(picture, transparency=bytes(range(256)))


PICTURES: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "palette with transparency": ("png", palette),
    "RGBA": ("png", lambda side: image_bytes(Image.new("RGBA", (side, side), (9, 99, 199, 50)))),
    "16 bits": ("png", lambda side: image_bytes(Image.fromarray(np.full((side, side), 40000, np.uint16)))),
    "progressive CMYK": (
        "jpg",
        lambda side: image_bytes(
            Image.new("CMYK", (side, side), (9, 99, 199, 50)), "JPEG", progressive=True, subsampling=0
        ),
    ),
    "WebP": ("webp", lambda side: image_bytes(Image.new("RGBA", (side, side), (9, 99, 199, 50)), "WEBP", method=0)),
    "lossless WebP": (
        "webp",
        lambda side: image_bytes(Image.new("RGBA", (side, side), (9, 99, 199, 50)), "WEBP", lossless=True, method=0),
    ),
    "turned TIFF of one strip": (
        "tiff",
        lambda side: image_bytes(
            Image.new("RGBA", (side, side)), "TIFF", compression="tiff_deflate", tiffinfo={278: side, 274: 6}
        ),
    ),
    "as tall as can be": (
        "png",
        lambda side: image_bytes(
            Image.new("RGB", (65535 if side > 100 else 8, LIMITS.max_pixels // 65535)).rotate(90, expand=True)
        ),
    ),
}


@pytest.mark.parametrize("family", PICTURES)
def test_a_picture(family: str, tmp_path: Path) -> None:
    name, make = PICTURES[family]
    large = make(SIDE)
    with Image.open(io.BytesIO(large)) as picture:
        estimate = DECODING.get(picture.format or "", USUAL_DECODING) * LIMITS.max_pixels
    assert peak_of("image", large, make(64), name, tmp_path) <= estimate / 2**20 <= BOUND


@pytest.mark.parametrize("kind", ["FLAC", "MP3"])
def test_a_long_recording(kind: str, tmp_path: Path) -> None:
    rate = 8000
    large = sound_bytes(np.tile(sine(10.0, rate), 360), rate, kind)
    if kind == "MP3":
        # Without its first frame, which counts the others, it must be decoded to find its length.
        large = large[large.index(b"\xff", 100) :]
    assert peak_of("audio", large, sound_bytes(sine(1.0, rate), rate, kind), kind.lower(), tmp_path) <= 100


def test_many_channels(tmp_path: Path) -> None:
    large = sound_bytes(np.zeros((60_000, 1024), dtype=np.int16), 8000)
    assert peak_of("audio", large, sound_bytes(sine(1.0, 8000), 8000), "wav", tmp_path) <= 100


def test_a_long_imu_csv(tmp_path: Path) -> None:
    lines = (b"1,2,3,4,5,6\n" * 1_000_000, b"1,2,3,4,5,6\n" * 10)
    assert peak_of("imu", *lines, "csv", tmp_path, rate=1000) <= 100
    header, body = b"t_ms,ax,ay,az,gx,gy,gz\n", b",1,2,3,4,5,6\n"
    timed = [header + body.join(b"%d" % (5 * row) for row in range(rows)) + body for rows in (500_000, 10)]
    assert peak_of("imu", *timed, "csv", tmp_path) <= 100


def test_a_long_imu_npy(tmp_path: Path) -> None:
    values = np.zeros((5_000_000, 6), dtype=np.float64)
    assert peak_of("imu", npy_bytes(values), npy_bytes(values[:10]), "npy", tmp_path, rate=1000) <= 50


VIDEOS = {
    # The maximum that H.264 can state; with 10 bits, the maximum that is accepted.
    "yuv420p, 16 references": ("libx264", "yuv420p", 4096, 2160, 16),
    "yuv420p10le, 5 references": ("libx264", "yuv420p10le", 4096, 2160, 5),
    "yuv444p, 5 references": ("libx264", "yuv444p", 4096, 2160, 5),
    "HEVC of a phone": ("libx265", "yuv420p10le", 3840, 2160, 5),
    "VP9": ("libvpx-vp9", "yuv420p", 4096, 2160, 3),
    "VP9 with transparency": ("libvpx-vp9", "yuva420p", 1920, 1080, 3),
}


@pytest.mark.parametrize("family", VIDEOS)
def test_a_video_of_large_frames(family: str, tmp_path: Path) -> None:
    """Memory use stays within the estimate, and the estimate within the limit, whether frames are rotated or not."""
    codec, pixels, width, height, references = VIDEOS[family]
    container = "webm" if codec.startswith("libvpx") else "mp4"
    # Enough frames to fill the decoder's buffer.
    settings = {"codec": codec, "pixels": pixels, "references": references, "count": 24, "container": container}
    large = coded_video(tmp_path, width=width, height=height, **settings)
    small = coded_video(tmp_path, width=64, height=64, **settings)
    with av.open(io.BytesIO(large)) as opened:
        context = opened.streams.video[0].codec_context
        estimate = decoding_bytes(context, width, height, av.VideoFormat(pixels))
    if container == "mp4":
        large, small = (with_matrix(made, (0, 1, -1, 0)) for made in (large, small))
    peak = peak_of("video", large, small, container, tmp_path)
    assert 50 < peak <= estimate / 2**20 <= BOUND


def test_a_video_that_may_take_more_is_refused(tmp_path: Path) -> None:
    large = coded_video(
        tmp_path, codec="libx264", pixels="yuv420p10le", width=4096, height=2160, references=16, count=20
    )
    with pytest.raises(MediaError, match=r"takes up to \d+ more to decode, above data.limits.max_load_bytes=536870912"):
        VideoModality.probe(large, "mp4", {}, LIMITS)
