"""The worst file that the default limits accept costs a loader process 512 MB at most."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media import image_bytes, npy_bytes, sine, sound_bytes
from PIL import Image

from megatron_anymal.config import LimitsConfig

LIMITS = LimitsConfig()
# Two square sides that just fit.
SIDE = int(LIMITS.max_pixels**0.5)
BOUND = 512

pytestmark = pytest.mark.slow


def peak_of(kind: str, large: bytes, small: bytes, name: str, folder: Path, **attributes: Any) -> int:
    """MiB that loading `large` takes; `small` of the same kind loads the libraries."""
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
    assert peak_of("image", make(SIDE), make(64), name, tmp_path) <= BOUND


@pytest.mark.parametrize("kind", ["FLAC", "MP3"])
def test_a_long_recording(kind: str, tmp_path: Path) -> None:
    rate = 8000
    large = sound_bytes(np.tile(sine(10.0, rate), 360), rate, kind)
    if kind == "MP3":
        # Without its first frame, which counts the others, it has to be decoded to be measured.
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


def test_a_video_of_large_frames(tmp_path: Path) -> None:
    import av

    def video(width: int, height: int, pixels: str, references: int) -> bytes:
        path = tmp_path / "made.mp4"
        options = {"preset": "ultrafast", "x264-params": f"ref={references}:bframes=0"}
        with av.open(str(path), "w") as output:
            track = output.add_stream("libx264", rate=8, options=options)
            track.width, track.height, track.pix_fmt = width, height, pixels
            # Enough that the decoder holds as many as it may.
            for number in range(20):
                shade = np.full((height, width), 40 + 8 * number, dtype=np.uint8)
                output.mux(track.encode(av.VideoFrame.from_ndarray(shade, format="gray").reformat(format=pixels)))
            output.mux(track.encode(None))
        return path.read_bytes()

    # The most that H.264 can state; with 10 bits the most that its levels allow at this size.
    for pixels, references in (("yuv420p", 16), ("yuv420p10le", 6)):
        large, small = video(4096, 2160, pixels, references), video(64, 64, pixels, references)
        assert peak_of("video", large, small, "mp4", tmp_path) <= BOUND
