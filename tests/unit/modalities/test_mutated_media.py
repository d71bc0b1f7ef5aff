"""Damaged files of every format are either read or refused by name; no other error is raised."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from media import (
    CLIP_SHAPE,
    SMALL_AUDIO,
    container_sound,
    image_bytes,
    noise_image,
    npy_bytes,
    png_bytes,
    section,
    sine,
    sound_bytes,
    video_bytes,
)
from PIL import Image

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities import MediaError, Modality, build_modality

MUTATIONS = 200
# Low limits, so that a damaged header that states large sizes is refused at once.
LIMITS = LimitsConfig(max_pixels=1_000_000, max_frame_pixels=1_000_000, max_seconds=60, max_values=2_000_000)

MODALITIES: dict[str, Callable[[], Modality]] = {
    "image": lambda: build_modality("image", section("clip", CLIP_SHAPE), LIMITS),
    "video": lambda: build_modality("video", section("clip", CLIP_SHAPE, num_frames=2, clip_seconds=1.0), LIMITS),
    "audio": lambda: build_modality("audio", section("identity", **SMALL_AUDIO), LIMITS),
    "imu": lambda: build_modality("imu", section("imu2clip"), LIMITS),
}


def with_palette() -> bytes:
    return image_bytes(noise_image(24, 20).quantize(16), transparency=bytes(range(16)))


def imu_csv() -> bytes:
    rows = "\n".join(f"{20 * row},{row},2.5,3,4,5,6" for row in range(20))
    return f"timestamp_ms,acc_x,acc_y,acc_z,gyro_x,gyro_y,gyro_z\n{rows}".encode()


def picture(mode: str, kind: str, **arguments: Any) -> Callable[[], bytes]:
    return lambda: image_bytes(noise_image(24, 20, "RGBA").convert(mode), kind, **arguments)


def exif() -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = 6
    return made


SOUND = sine(0.4, 8000)
FILES: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "jpeg": ("image", "jpg", picture("RGB", "JPEG", exif=exif())),
    "progressive cmyk jpeg": ("image", "jpg", picture("CMYK", "JPEG", progressive=True)),
    "png": ("image", "png", picture("RGBA", "PNG", exif=exif())),
    "palette png": ("image", "png", with_palette),
    "16-bit png": ("image", "png", lambda: png_bytes(np.full((20, 24), 50_000, np.uint16), 16, b"\xc3\x50")),
    "webp": ("image", "webp", picture("RGBA", "WEBP")),
    "bmp": ("image", "bmp", picture("RGB", "BMP")),
    "tiff": ("image", "tiff", picture("RGB", "TIFF", compression="tiff_lzw", tiffinfo={0x0112: 6})),
    "ppm": ("image", "ppm", picture("RGB", "PPM")),
    "gif": ("image", "gif", picture("L", "GIF")),
    "mp4": ("video", "mp4", lambda: video_bytes(8)),
    "webm": ("video", "webm", lambda: video_bytes(8, container="webm", codec="libvpx-vp9")),
    "mkv": ("video", "mkv", lambda: video_bytes(8, container="matroska", sound_seconds=0.5)),
    "avi": ("video", "avi", lambda: video_bytes(8, container="avi", codec="mpeg4")),
    "wav": ("audio", "wav", lambda: sound_bytes(SOUND, 8000)),
    "aiff": ("audio", "aiff", lambda: sound_bytes(SOUND, 8000, "AIFF")),
    "flac": ("audio", "flac", lambda: sound_bytes(SOUND, 8000, "FLAC")),
    "vorbis": ("audio", "ogg", lambda: sound_bytes(SOUND, 8000, "OGG")),
    "opus": ("audio", "opus", lambda: sound_bytes(sine(0.4, 48000), 48000, "OGG", subtype="OPUS") * 2),
    "mp3": ("audio", "mp3", lambda: sound_bytes(sine(0.4, 44100), 44100, "MP3")),
    "m4a": ("audio", "m4a", lambda: container_sound(sine(0.4, 48000), "ipod", "aac")),
    "adts": ("audio", "aac", lambda: container_sound(sine(0.4, 48000), "adts", "aac")),
    "webm sound": ("audio", "webm", lambda: container_sound(sine(0.4, 48000), "webm", "libopus")),
    "npy": ("imu", "npy", lambda: npy_bytes(np.arange(120.0).reshape(20, 6))),
    "csv": ("imu", "csv", imu_csv),
}


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The file cut off, with a few bytes removed, or with a few changed, near its beginning or anywhere."""
    changed = bytearray(data)
    way = rng.integers(5)
    if way == 0:
        return data[: rng.integers(len(data))]
    if way == 1:
        start = rng.integers(len(data))
        del changed[start : start + rng.integers(1, 20)]
        return bytes(changed)
    within = min(len(data), 128) if way == 2 else len(data)
    for position in rng.integers(within, size=rng.integers(1, 5)):
        changed[position] = rng.integers(256)
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_only_media_errors(name: str) -> None:
    kind, extension, make = FILES[name]
    modality, data = MODALITIES[kind](), make()
    attributes = {"rate": 50} if extension == "npy" else {}
    assert len(modality.load(data, extension, attributes)) > 0
    rng = np.random.default_rng(sum(name.encode()))
    refused = 0
    for _ in range(MUTATIONS):
        damaged = mutated(data, rng)
        try:
            pieces = modality.load(damaged, extension, attributes)
            assert torch.isfinite(pieces).all() and pieces.shape[1:] == modality.piece_shape
        except MediaError as error:
            refused += 1
            assert "\n" not in str(error) and "object at 0x" not in str(error)
    assert refused > 0


def test_messages_do_not_name_objects_in_memory() -> None:
    for kind in MODALITIES:
        with pytest.raises(MediaError) as caught:
            MODALITIES[kind]().load(io.BytesIO(b"neither this nor that" * 20).getvalue(), "csv", {"rate": 1})
        assert "BytesIO" not in str(caught.value) and "<none>" not in str(caught.value)
