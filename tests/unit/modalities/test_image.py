"""Images against Pillow and transformers' CLIP preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import CLIP_SHAPE, DINOV2_SHAPE, image_bytes, noise_image, section
from PIL import Image
from transformers import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_anymal.config import ConfigError
from megatron_anymal.modalities import MediaError, Modality, build_modality


def image(**options: Any) -> Modality:
    return build_modality("image", section("clip", CLIP_SHAPE, **options))


def clip_pixels(picture: Image.Image, side: int) -> torch.Tensor:
    """Pixels from transformers' processor for the whole picture, [3, side, side]."""
    processor = CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False)
    return processor(picture, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("size", [(32, 32), (20, 20), (7, 31), (200, 100)])
def test_one_tile_equals_clips_processor(size: tuple[int, int]) -> None:
    picture = noise_image(*size)
    pieces = image(max_grid=1).load(image_bytes(picture), "png", {})
    assert pieces.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pieces[0], clip_pixels(picture, 32), rtol=0, atol=1e-6)


def test_grid_is_the_next_larger_multiple_row_by_row_after_the_overview() -> None:
    picture = noise_image(70, 40)
    pieces = image().load(image_bytes(picture), "png", {})
    assert pieces.shape == (10, 3, 32, 32)
    torch.testing.assert_close(pieces[0], clip_pixels(picture, 32), rtol=0, atol=1e-6)
    whole = clip_pixels(picture, 96)
    for row in range(3):
        for column in range(3):
            tile = whole[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            torch.testing.assert_close(pieces[1 + 3 * row + column], tile, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "options", "count"),
    [
        ((32, 32), {}, 1),
        ((33, 5), {}, 5),
        ((5, 64), {"overview": False}, 4),
        ((5, 65), {"overview": False}, 9),
        ((1000, 10), {}, 17),
        ((1000, 10), {"max_grid": 2}, 5),
        ((1000, 10), {"max_grid": 1}, 1),
    ],
)
def test_count_and_load_agree(size: tuple[int, int], options: dict[str, Any], count: int) -> None:
    modality = image(**options)
    data = image_bytes(noise_image(*size))
    assert modality.probe(data, "png", {}) == size
    counts = modality.count_pieces(np.array([size, (32, 32)], dtype=np.float64))
    assert counts.tolist() == [count, 1] and counts.dtype == np.int64
    assert len(modality.load(data, "png", {})) == count


def test_exif_orientation_is_honoured() -> None:
    picture = noise_image(64, 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = image_bytes(picture, exif=exif)
    assert image().probe(data, "png", {}) == (16, 64)
    upright = image_bytes(picture.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(image().load(data, "png", {}), image().load(upright, "png", {}))


def test_grey_palette_and_alpha_become_rgb() -> None:
    grey = noise_image(16, 16, "L")
    plain = image().load(image_bytes(grey.convert("RGB")), "png", {})
    assert torch.equal(image().load(image_bytes(grey), "png", {}), plain)
    assert torch.equal(image().load(image_bytes(grey.convert("P")), "png", {}), plain)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert torch.equal(image().load(image_bytes(deep), "png", {}), plain)
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    white = image().load(image_bytes(Image.new("RGB", (16, 16), "white")), "png", {})
    assert torch.equal(image().load(image_bytes(clear), "png", {}), white)


def test_statistics_come_from_folder_type_or_options(tmp_path: Path) -> None:
    black = image_bytes(Image.new("RGB", (8, 8)))
    CLIPVisionConfig(**CLIP_SHAPE).save_pretrained(tmp_path)
    described = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    folder = build_modality("image", section("clip", path=str(tmp_path)))
    assert folder.load(black, "png", {})[0, :, 0, 0].tolist() == pytest.approx([-0.2, -0.4, -0.6])
    nested = {"image_processor": described}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    folder = build_modality("image", section("clip", path=str(tmp_path)))
    assert folder.load(black, "png", {})[0, :, 0, 0].tolist() == pytest.approx([-0.2, -0.4, -0.6])
    dinov2 = build_modality("image", section("dinov2", DINOV2_SHAPE)).load(black, "png", {})
    assert dinov2[0, 0, 0, 0].item() == pytest.approx(-0.485 / 0.229)
    given = image(image_mean=[0, 0, 0.5], image_std=[1, 1, 1]).load(black, "png", {})
    assert given[0, :, 0, 0].tolist() == [0, 0, -0.5]


def test_an_encoder_without_a_resolution_needs_the_option() -> None:
    with pytest.raises(ConfigError, match=r"model\.modalities\.image: .*options\.resolution"):
        build_modality("image", section("identity"))
    assert build_modality("image", section("identity", resolution=8)).piece_shape == (3, 8, 8)


@pytest.mark.parametrize(
    "options", [{"max_grid": 0}, {"image_mean": [0.5]}, {"image_std": [0, 1, 1]}, {"resolution": -1}]
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        image(**options)


def test_corrupt_images_are_refused() -> None:
    whole = image_bytes(noise_image(64, 64), "JPEG")
    modality = image()
    assert modality.load(whole, "jpg", {}).shape[0] == 5
    for data, reason in [
        (b"", "empty"),
        (b"not a picture", "cannot be decoded"),
        (whole[: len(whole) // 2], "cannot be decoded"),
        (whole[:20], "cannot be decoded"),
    ]:
        with pytest.raises(MediaError, match=reason):
            modality.load(data, "jpg", {})
    animated = image_bytes(noise_image(8, 8), "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with pytest.raises(MediaError, match="2 frames"):
        modality.probe(animated, "webp", {})
    with pytest.raises(MediaError, match="mode F"):
        modality.load(image_bytes(Image.new("F", (8, 8)), "TIFF"), "tiff", {})
