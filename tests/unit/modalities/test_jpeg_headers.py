"""A size that is read from a JPEG's header is the one that Pillow finds, also in damaged files."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities import image
from megatron_anymal.modalities.base import MediaError
from megatron_anymal.modalities.image import ImageModality
from megatron_anymal.modalities.jpeg_headers import plain_size
from megatron_anymal.modalities.pictures import opened, orientation_and_size

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Mode, and settings of the writer; the size is found without Pillow in all of these files.
PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("RGB", {}),
    ("RGB", {"quality": 10, "progressive": True}),
    ("RGB", {"quality": 100, "subsampling": 0, "optimize": True, "dpi": (72, 72)}),
    ("L", {"comment": b"grey"}),
    ("CMYK", {}),
    ("RGB", {"icc_profile": ICC}),
    ("RGB", {"restart_marker_blocks": 1}),
]


def jpeg(mode: str = "RGB", size: tuple[int, int] = (23, 11), **settings: Any) -> bytes:
    out = io.BytesIO()
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], bands), dtype=np.uint8)
    Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode).save(out, "JPEG", **settings)
    return out.getvalue()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def by_pillow(data: bytes) -> tuple[int, int] | None:
    try:
        with opened(data, LimitsConfig()) as picture:
            return orientation_and_size(picture)[1]
    except MediaError:
        return None


@pytest.mark.parametrize(("mode", "settings"), PLAIN)
def test_usual_files(mode: str, settings: dict[str, Any]) -> None:
    data = jpeg(mode, **settings)
    assert plain_size(data) == by_pillow(data) == (23, 11)


def test_files_that_pillow_decides() -> None:
    turned = jpeg(exif=exif(6))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    with_xmp = jpeg()[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + jpeg()[2:]
    out = io.BytesIO()
    Image.new("RGB", (23, 11)).save(out, "MPO", save_all=True, append_images=[Image.new("RGB", (5, 5))])
    for data in (turned, with_xmp, out.getvalue(), b"", jpeg()[:-3].replace(b"\xff\xda", b"\xff\x00")):
        assert plain_size(data) is None
    assert ImageModality.probe(turned, "jpg", {}) == ImageModality.probe(with_xmp, "jpg", {}) == (11.0, 23.0)
    assert ImageModality.probe(out.getvalue(), "jpg", {}) == (23.0, 11.0)


def test_damaged_headers() -> None:
    rng = random.Random(0)
    files = [jpeg(mode, **settings) for mode, settings in PLAIN]
    readable = 0
    for _ in range(6000):
        data = bytearray(rng.choice(files))
        scan = data.rindex(b"\xff\xda") + 12
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            position = rng.randrange(2, scan)
            change = rng.randrange(4)
            if change == 0:
                data[position] = rng.randrange(256)
            elif change == 1:
                data[position] ^= 1 << rng.randrange(8)
            elif change == 2:
                del data[position : position + rng.randrange(1, 9)]
            else:
                data[position:position] = rng.randbytes(rng.randrange(1, 9))
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        size = plain_size(bytes(data))
        readable += size is not None
        assert size is None or size == by_pillow(bytes(data))
    assert readable > 1000


@pytest.mark.parametrize("limits", [LimitsConfig(max_pixels=252), LimitsConfig(max_load_bytes=3600), LimitsConfig()])
def test_limits(limits: LimitsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [jpeg(size=(23, 11)), jpeg(size=(65_500, 1))]
    outcomes = []
    for decide in (image.plain_size, lambda data: None):
        monkeypatch.setattr(image, "plain_size", decide)
        for data in files:
            try:
                outcomes.append(str(ImageModality.probe(data, "jpg", {}, limits)))
            except MediaError as error:
                outcomes.append(str(error))
    assert outcomes[:2] == outcomes[2:]
    assert ("limits" in outcomes[0]) == (limits != LimitsConfig())
