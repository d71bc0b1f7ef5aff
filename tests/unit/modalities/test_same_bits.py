"""Images and videos have the bits of Pillow and of plain float arithmetic, wherever they are written to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from media import CLIP_SHAPE, DINOV2_SHAPE, npy_bytes, section, video_bytes
from photos import NAMES, flat, normalised, oriented, photo, tiles_of
from PIL import Image

from megatron_anymal.config import ModalityConfig
from megatron_anymal.modalities import MediaError, Modality, build_modality
from megatron_anymal.modalities.image import ImageModality
from megatron_anymal.modalities.video import VideoModality

SECTIONS = {
    "clip": section("clip", {**CLIP_SHAPE, "image_size": 224}, max_grid=3),
    "dinov2": section("dinov2", {**DINOV2_SHAPE, "image_size": 224}, max_grid=3),
    "given": section("identity", resolution=224, max_grid=3, image_mean=[0.1, 0.2, 0.3], image_std=[0.7, 1.0, 3.1]),
}


def image(config: ModalityConfig) -> ImageModality:
    modality = build_modality("image", config)
    assert isinstance(modality, ImageModality)
    return modality


def test_every_grey_level_is_normalised_to_the_bit() -> None:
    levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), 3, axis=3)
    for config in SECTIONS.values():
        pixels = image(config).pixels
        out = np.full((1, 3, 16, 16), np.nan, dtype=np.float32)
        pixels.normalise(levels, out)
        np.testing.assert_array_equal(out, normalised(levels, pixels.mean, pixels.std))


def files(picture: Image.Image) -> dict[str, bytes]:
    """The picture in several modes, formats and orientations."""
    clear = picture.copy()
    clear.putalpha(picture.convert("L"))
    return {
        "RGB": oriented(picture, "JPEG", quality=90),
        "progressive": oriented(picture, "JPEG", quality=75, progressive=True, subsampling=0),
        "L": oriented(picture.convert("L"), "JPEG"),
        "CMYK": oriented(picture.convert("CMYK"), "JPEG"),
        "RGBA": oriented(clear, "PNG"),
        "LA": oriented(clear.convert("LA"), "PNG"),
        "P": oriented(picture.quantize(64), "PNG"),
        "1": oriented(picture.convert("1"), "PNG"),
        "WEBP": oriented(clear, "WEBP", lossless=True, method=0),
        **{f"turned {n}": oriented(picture, "JPEG", n) for n in range(2, 9)},
    }


@pytest.mark.parametrize("name", NAMES)
def test_photographs_have_pillows_bits(name: str) -> None:
    modality = image(SECTIONS["clip"])
    for kind, data in files(photo(name)).items():
        expected = tiles_of(flat(data), 224, 3)
        out = np.full((len(expected), *modality.piece_shape), np.nan, dtype=np.float32)
        assert modality.load_array(data, "jpg", {}, out) is out, kind
        np.testing.assert_array_equal(out, normalised(expected, modality.pixels.mean, modality.pixels.std), kind)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_part_of_a_batch_is_written_in_place(kind: str) -> None:
    config = section("clip", CLIP_SHAPE)
    modality = build_modality(kind, config)
    data = oriented(photo("china.jpg").resize((60, 40)), "PNG") if kind == "image" else video_bytes(64)
    alone = modality.load_array(data, "", {})
    batch = np.full((len(alone) + 2, *modality.piece_shape), 7, dtype=np.float32)
    modality.load_array(data, "", {}, batch[1:-1])
    np.testing.assert_array_equal(batch[1:-1], alone)
    assert (batch[[0, -1]] == 7).all() and len(alone) > 1
    with pytest.raises(MediaError, match=rf"yields {len(alone)} pieces, but the index states {len(alone) - 1}"):
        modality.load_array(data, "", {}, batch[: len(alone) - 1])


class Signal(Modality):
    """A modality without a `write` of its own: the array in an npy file, [3] per piece."""

    extensions = ("npy",)
    Options: Any = type(image(SECTIONS["given"]).options)
    piece_shape = (3,)

    @classmethod
    def probe(cls, data: bytes, extension: str, attributes: Any, limits: Any = None) -> tuple[float, float]:
        return 1.0, 1.0

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        return np.ones(len(sizes), dtype=np.int64)

    def decode(self, data: bytes, extension: str, attributes: Any, pieces: int) -> np.ndarray:
        return np.frombuffer(data[-3 * int(attributes["bytes"]) :], attributes["type"])[None]


@pytest.mark.parametrize("kind", ["u1", "i8", "f4", "f8"])
def test_any_type_becomes_float32_and_floats_are_checked(kind: str) -> None:
    values = np.array([1, 200, 3], dtype=kind)
    modality, attributes = Signal(section("identity")), {"bytes": values.itemsize, "type": kind}
    array = modality.load_array(npy_bytes(values), "npy", attributes)
    assert array.dtype == np.float32 and array.tolist() == [[1, 200, 3]]
    if kind[0] == "f":
        # 1e300 is finite as float64 but not as float32.
        for wrong in (np.nan, np.inf, 1e300):
            with np.errstate(over="ignore"):
                values[1] = wrong
            with pytest.raises(MediaError, match="non-finite values"):
                modality.load_array(npy_bytes(values), "npy", attributes)


def test_video_frames_have_pillows_bits() -> None:
    modality = build_modality("video", section("clip", CLIP_SHAPE, num_frames=4, clip_seconds=1.0))
    assert isinstance(modality, VideoModality)
    data = video_bytes(16, noise=np.random.default_rng(0))
    pixels = modality.decode(data, "mp4", {}, 2)
    assert pixels.shape == (2, 4, 32, 32, 3) and pixels.dtype == np.uint8
    expected = normalised(pixels.reshape(-1, 32, 32, 3), modality.pixels.mean, modality.pixels.std)
    np.testing.assert_array_equal(modality.load_array(data, "mp4", {}).reshape(-1, 3, 32, 32), expected)


class Narrower(ImageModality):
    """States another size than the file's, and decodes as before."""

    @classmethod
    def probe(cls, data: bytes, extension: str, attributes: Any, limits: Any = None) -> tuple[float, float]:
        return 10.0, 10.0


class Brighter(ImageModality):
    """Changes what was decoded."""

    def decode(self, data: bytes, extension: str, attributes: Any, pieces: int) -> np.ndarray:
        return super().decode(data, extension, attributes, pieces) | 1


class WithFloats(ImageModality):
    """Returns what only `write` should make."""

    def decode(self, data: bytes, extension: str, attributes: Any, pieces: int) -> np.ndarray:
        return super().decode(data, extension, attributes, pieces) / 255


def test_what_a_subclass_overrides_is_asked() -> None:
    data, config = oriented(photo(NAMES[0]), "JPEG"), SECTIONS["clip"]
    plain = image(config).load_array(data, "jpg", {})
    # One tile by the stated size, several by the file's.
    with pytest.raises(MediaError, match="implies"):
        Narrower(config).load_array(data, "jpg", {})
    assert not np.array_equal(Brighter(config).load_array(data, "jpg", {}), plain)
    with pytest.raises(MediaError, match=r"float64 by WithFloats, which must return 8-bit pixels"):
        WithFloats(config).load_array(data, "jpg", {})
