"""resize_backend=torch: how far its pixels are from Pillow's, and that files and errors are the same."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from media import CLIP_SHAPE, image_bytes, noise_image, section, video_bytes
from photos import NAMES, oriented, photo
from PIL import Image

from megatron_anymal.config import ConfigError, LimitsConfig, ModalityConfig
from megatron_anymal.modalities import MediaError, Modality, build_modality
from megatron_anymal.modalities.resizing import TORCH_FILTERS, with_pillow, with_torch


def image(backend: str, limits: LimitsConfig | None = None, **options: Any) -> Modality:
    plain = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "max_grid": 1, "resolution": 32}
    config = section("clip", CLIP_SHAPE, **{**plain, **options, "resize_backend": backend})
    return build_modality("image", config, limits or LimitsConfig())


def levels(modality: Modality, data: bytes, extension: str = "jpg") -> np.ndarray:
    """The pixels in 0 to 255, as integers."""
    return (modality.load_array(data, extension, {}) * 255).round().astype(int)


@pytest.mark.parametrize("resample", TORCH_FILTERS)
@pytest.mark.parametrize("name", NAMES)
def test_photographs_are_at_most_two_levels_off(name: str, resample: int) -> None:
    off: list[np.ndarray] = []
    for size in ((640, 427), (512, 384), (300, 200)):
        picture = photo(name).resize(size, Image.Resampling.LANCZOS)
        for side in (32, 224, 336, 448, 672, 900):
            resized = with_torch(np.asarray(picture), side, resample).astype(int)
            off.append(np.abs(resized - with_pillow(picture, side, resample)).ravel())
            assert (off[-1] > 0).mean() < 0.035 and off[-1].max() <= 2
    every = np.concatenate(off)
    assert (every > 0).mean() < 0.01 and (every > 1).mean() < 2e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3), (33, 31), (32, 32)])
def test_small_pictures(size: tuple[int, int]) -> None:
    picture = noise_image(*size)
    off = np.abs(with_torch(np.asarray(picture), 32, 3).astype(int) - with_pillow(picture, 32, 3))
    assert off.max() <= (0 if size == (32, 32) else 2)


def test_both_backends_read_the_same_files() -> None:
    picture = photo("china.jpg").resize((192, 128))
    clear = picture.copy()
    clear.putalpha(picture.convert("L"))
    files = {
        **{f"turned {n}": oriented(picture, "JPEG", n, quality=90) for n in range(1, 9)},
        **{f"subsampled {n}": oriented(picture, "JPEG", 6, subsampling=n) for n in range(3)},
        "progressive": oriented(picture, "JPEG", progressive=True),
        "L": oriented(picture.convert("L"), "JPEG", 8),
        "CMYK": oriented(picture.convert("CMYK"), "JPEG", 5),
        "RGBA": oriented(clear, "PNG", 7),
        "WEBP": oriented(clear, "WEBP", 3),
        "P": oriented(picture.quantize(64), "PNG"),
        "MPO": image_bytes(picture, "MPO", save_all=True, append_images=[picture.convert("L").convert("RGB")]),
        "trailing bytes": oriented(picture, "JPEG") + b"x" * 100,
    }
    for options in ({}, {"max_grid": 4, "resolution": 64}):
        pillow, torch = image("pillow", **options), image("torch", **options)
        for kind, data in files.items():
            assert np.abs(levels(pillow, data) - levels(torch, data)).max() <= 2, kind


def test_simplejpeg_decodes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: the pixels of what is left to Pillow are Pillow's."""
    calls: list[str] = []
    decode = simplejpeg.decode_jpeg

    def noting(data: bytes, *arguments: Any, **settings: Any) -> np.ndarray:
        calls.append("begun")
        pixels = decode(data, *arguments, **settings)
        calls[-1] = "done"
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", noting)
    picture = photo("flower.jpg").resize((96, 64))
    for mode, expected in (("RGB", ["done"]), ("L", ["done"]), ("CMYK", [])):
        calls.clear()
        image("torch").load_array(oriented(picture.convert(mode), "JPEG", quality=85), "jpg", {})
        assert calls == expected
    calls.clear()
    image("pillow").load_array(oriented(picture, "JPEG"), "jpg", {})
    image("torch").load_array(oriented(picture, "PNG"), "png", {})
    assert calls == []


def twelve_bits() -> bytes:
    """A JPEG whose frame header states 12 bits."""
    data = bytearray(image_bytes(noise_image(64, 48), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


def test_errors_and_limits_are_the_same() -> None:
    whole = image_bytes(noise_image(64, 48), "JPEG", quality=95)
    wrong = {
        "empty": b"",
        "other": b"no picture" * 10,
        "12 bits": twelve_bits(),
        **{f"cut at {share}": whole[: int(len(whole) * share)] for share in (0.02, 0.3, 0.5, 0.9, 0.99)},
    }
    rng = np.random.default_rng(0)
    for number in range(40):
        data = bytearray(whole)
        for position in rng.integers(2, len(data), 3):
            data[position] = rng.integers(256)
        wrong[f"damage {number}"] = bytes(data)
    refused = 0
    for name, data in wrong.items():
        outcomes = []
        for backend in ("pillow", "torch"):
            try:
                outcomes.append(levels(image(backend), data))
            except MediaError as error:
                outcomes.append(str(error))
        pillow, torch = outcomes
        if isinstance(pillow, str) or isinstance(torch, str):
            assert pillow == torch, name
            refused += 1
        else:
            assert np.abs(pillow - torch).max() <= 2, name
    assert refused > 10
    for backend in ("pillow", "torch"):
        with pytest.raises(MediaError, match=r"has 3072 pixels \(64 x 48\), above data.limits.max_pixels=3071"):
            image(backend, LimitsConfig(max_pixels=3071)).load_array(whole, "jpg", {})


def test_video_frames_are_at_most_two_levels_off() -> None:
    data = video_bytes(16, noise=np.random.default_rng(0))
    clips = []
    for backend in ("pillow", "torch"):
        options = {"num_frames": 4, "clip_seconds": 1.0, "resize_backend": backend}
        clips.append(build_modality("video", section("clip", CLIP_SHAPE, **options)).decode(data, "mp4", {}, 2))
    off = np.abs(clips[0].astype(int) - clips[1])
    assert 0 < off.max() <= 2 and (off > 0).mean() < 0.035


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_gives_the_same_bits(capability: str, tmp_path: Path) -> None:
    code = (
        "import hashlib, sys, numpy as np\n"
        "from megatron_anymal.modalities.resizing import with_torch\n"
        "rng = np.random.default_rng(0)\n"
        "hash = hashlib.sha256()\n"
        "for height, width, side in ((427, 640, 224), (384, 512, 336), (50, 70, 224), (1, 9, 32)):\n"
        "    smooth = rng.integers(0, 256, (height, width, 3)).cumsum(1) // np.arange(1, width + 1)[:, None]\n"
        "    for resample in (2, 3):\n"
        "        hash.update(with_torch(smooth.astype(np.uint8), side, resample).tobytes())\n"
        "print(hash.hexdigest())\n"
    )
    digests = []
    for setting in ({}, {"ATEN_CPU_CAPABILITY": capability}):
        environment = {**os.environ, **setting}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        digests.append(done.stdout)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("size", [(336, 336), (640, 360), (33, 47)])
def test_channels_last_pixels_are_resized_as_planes_are(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    planes = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()[None]
    expected = torch.nn.functional.interpolate(planes, size=(224, 224), mode="bicubic", antialias=True)
    resized = with_torch(pixels, 224, 3)
    np.testing.assert_array_equal(resized, expected[0].permute(1, 2, 0).numpy())
    # What follows would otherwise read it across the planes.
    assert resized.flags["C_CONTIGUOUS"]


def test_impossible_backends() -> None:
    with pytest.raises(ConfigError, match=r"resize_backend='torhc' is unknown\. Did you mean 'torch'"):
        image("torhc")
    config: ModalityConfig = section("clip", CLIP_SHAPE, resize_backend="torch")
    config.encoder.preprocessor = {"resample": 1}
    with pytest.raises(ConfigError, match=r"resize_backend=torch lacks Pillow's filter 1.*Set it to pillow"):
        build_modality("image", config)
