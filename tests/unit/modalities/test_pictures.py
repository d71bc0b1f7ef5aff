"""Decoding of pixel formats, compared with Pillow's work on the whole picture at once."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from media import CLIP_SHAPE, image_bytes, noise_image, png_bytes, section, tiff_bytes
from PIL import Image, ImageOps

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities import MediaError, Modality, build_modality, pictures


def image(**options: Any) -> Modality:
    """An image modality without normalisation: pixels keep their values / 255."""
    plain = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "max_grid": 1, "resolution": 32}
    return build_modality("image", section("clip", CLIP_SHAPE, **{**plain, **options}))


def seen(data: bytes, extension: str = "png", **options: Any) -> np.ndarray:
    """The whole picture as the encoder sees it, [32, 32, 3] in 0 to 255."""
    return (image(**options).load(data, extension, {})[0] * 255).round().numpy().transpose(1, 2, 0)


def whole_at_once(data: bytes) -> Image.Image:
    """Upright RGB over white, made by Pillow without strips."""
    picture = Image.open(io.BytesIO(data))
    picture = ImageOps.exif_transpose(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def palette_with_transparency() -> Image.Image:
    picture = noise_image(61, 43).quantize(64)
    picture.info["transparency"] = bytes(np.random.default_rng(1).integers(0, 256, 64, dtype=np.uint8))
    return picture


def oriented(picture: Image.Image, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    transparency = {"transparency": picture.info["transparency"]} if "transparency" in picture.info else {}
    return image_bytes(picture, kind, exif=exif, **transparency)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("CMYK", "JPEG")],
)
def test_strips_equal_the_whole_picture(
    mode: str, kind: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = palette_with_transparency() if mode == "P" else noise_image(61, 43, "RGBA").convert(mode)
    data = oriented(picture, kind, orientation)
    monkeypatch.setattr(pictures, "STRIP_PIXELS", 200)
    expected = whole_at_once(data)
    assert image().probe(data, kind, {}) == expected.size
    np.testing.assert_array_equal(seen(data), np.asarray(expected.resize((32, 32), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_once(orientation: int) -> None:
    picture = noise_image(64, 48)
    tiff = image_bytes(picture, "TIFF", tiffinfo={0x0112: orientation})
    png = oriented(picture, "PNG", orientation)
    assert (
        image().probe(tiff, "tiff", {}) == image().probe(png, "png", {}) == ((64, 48) if orientation < 5 else (48, 64))
    )
    np.testing.assert_array_equal(seen(tiff, "tiff"), seen(png))


def test_sixteen_bits_of_grey_keep_the_high_byte() -> None:
    values = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    for data, extension in [
        (png_bytes(values, 16), "png"),
        (tiff_bytes(32, 32, values.astype("<u2").tobytes(), 16), "tiff"),
        (b"P5 32 32 65535\n" + values.astype(">u2").tobytes(), "ppm"),
    ]:
        np.testing.assert_array_equal(seen(data, extension)[..., 0], values >> 8)


def test_twelve_bits_that_the_file_states_are_scaled_to_eight() -> None:
    values = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 4
    first, second = values.ravel()[::2].astype(np.uint32), values.ravel()[1::2].astype(np.uint32)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8)
    np.testing.assert_array_equal(seen(tiff_bytes(32, 32, packed.tobytes(), 12), "tiff")[..., 0], values >> 4)


@pytest.mark.parametrize("peak", [1, 255, 4095])
def test_few_bits_in_sixteen_are_refused(peak: int) -> None:
    values = np.full((32, 32), peak, dtype=np.uint16)
    for data in (png_bytes(values, 16), png_bytes(np.repeat(values[..., None], 3, axis=2), 16)):
        with pytest.raises(MediaError, match=r"16-bit samples that use less than 12 bits .*scale them"):
            seen(data)
    assert not seen(png_bytes(np.zeros((32, 32), dtype=np.uint16), 16)).any()


@pytest.mark.parametrize(
    ("samples", "bits", "sample_format"),
    [(np.full(1024, 200, "<i4"), 32, 2), (np.full(1024, 0.5, "<f4"), 32, 3), (np.full(1024, 200, "<i2"), 16, 2)],
)
def test_samples_of_unknown_range_are_refused(samples: np.ndarray, bits: int, sample_format: int) -> None:
    with pytest.raises(MediaError, match="range is unknown: store 8- or 16-bit ones"):
        seen(tiff_bytes(32, 32, samples.tobytes(), bits, sample_format), "tiff")


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_transparent_grey_is_white_at_every_depth(bits: int) -> None:
    top = 2**bits - 1
    values = np.full((32, 32), top // 3, dtype=np.uint16)
    values[16:] = 2 * top // 3
    plain = seen(png_bytes(values, bits))
    clear = seen(png_bytes(values, bits, struct.pack(">H", top // 3)))
    assert (clear[:16] == 255).all() and (plain[:16] == 85).all()
    np.testing.assert_array_equal(clear[16:], plain[16:])
    # A different grey value, however close.
    near = seen(png_bytes(values, bits, struct.pack(">H", top // 3 - 1)))
    np.testing.assert_array_equal(near, plain)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_white_at_every_depth(bits: int) -> None:
    values = np.zeros((32, 32, 3), dtype=np.uint16)
    values[:16], values[16:] = (10, 200, 30), (40, 50, 60)
    if bits == 16:
        values = values * 256 + 3
    clear = seen(png_bytes(values, bits, struct.pack(">3H", *(values[0, 0].tolist()))))
    assert (clear[:16] == 255).all() and (clear[16:] == (40, 50, 60)).all()


def test_misnamed_files_are_read_by_content_and_others_are_named() -> None:
    picture = noise_image(32, 32, "L")
    np.testing.assert_array_equal(seen(image_bytes(picture, "GIF"), "jpg")[..., 0], np.asarray(picture))
    for data in (image_bytes(picture, "ICO"), image_bytes(picture.convert("RGB"), "PDF"), b"no picture"):
        with pytest.raises(MediaError, match="damaged, or not one of JPEG, PNG") as caught:
            seen(data)
        assert "BytesIO" not in str(caught.value)


def test_the_pixel_limit_is_checked_before_decoding() -> None:
    palette = Image.new("P", (12000, 12000))

    with warnings.catch_warnings():
        # Pillow's own limit neither warns nor refuses.
        warnings.simplefilter("error")
        wanted = (
            r"has 144000000 pixels \(12000 x 12000\), above data.limits.max_pixels=30000000; scale it down or raise"
        )
        data = image_bytes(palette, "GIF", transparency=0)
        for modality in (image(), build_modality("image", section("clip", CLIP_SHAPE), LimitsConfig())):
            with pytest.raises(MediaError, match=wanted):
                modality.probe(data, "png", {})
            with pytest.raises(MediaError, match=wanted):
                modality.load(data, "png", {})
        jpeg = bytearray(image_bytes(Image.new("L", (8, 8)), "JPEG"))
        start = jpeg.index(b"\xff\xc0") + 5
        jpeg[start : start + 4] = struct.pack(">HH", 20000, 20000)
        with pytest.raises(MediaError, match="has 400000000 pixels"):
            image().probe(bytes(jpeg), "jpg", {})
        raised = LimitsConfig(max_pixels=400_000_000)
        with pytest.raises(MediaError, match="takes up to 5000000000 more to decode, above"):
            image().probe(bytes(jpeg), "jpg", {}, raised)
        raised.max_load_bytes = 6 * 10**9
        assert image().probe(bytes(jpeg), "jpg", {}, raised) == (20000, 20000)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_a_limit_of_the_run_reaches_load() -> None:
    data = image_bytes(noise_image(32, 32))
    modality = build_modality("image", section("clip", CLIP_SHAPE), LimitsConfig(max_pixels=1023))
    with pytest.raises(MediaError, match=r"has 1024 pixels \(32 x 32\), above data.limits.max_pixels=1023"):
        modality.load(data, "png", {})
    modality = build_modality("image", section("clip", CLIP_SHAPE), LimitsConfig(max_pixels=1024))
    assert torch.isfinite(modality.load(data, "png", {})).all()


def test_sides_beyond_jpegs_are_refused() -> None:
    with pytest.raises(MediaError, match=r"\(65536 x 1\); no side may be longer than 65535"):
        seen(image_bytes(Image.new("L", (65536, 1))))
    assert image().probe(image_bytes(Image.new("L", (65535, 1))), "png", {}) == (65535, 1)
