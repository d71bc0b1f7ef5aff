"""Registry, options and plug-ins."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from media import CLIP_SHAPE, npy_bytes, section

from megatron_anymal.config import ConfigError, EncoderConfig, LimitsConfig
from megatron_anymal.modalities import (
    MODALITIES,
    MediaError,
    build_modality,
    kind_for_extension,
    load_plugins,
    register,
)
from megatron_anymal.modalities.imu import IMUModality
from megatron_anymal.model.encoders import ENCODERS, build_encoder

THERMAL = str(Path(__file__).parents[3] / "examples" / "thermal_modality.py")


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Hide plug-ins loaded by other tests, and remove those that a test loads."""
    known: list[dict[str, Any]] = [MODALITIES, ENCODERS]
    kinds, encoders = ([name for name, cls in some.items() if "_plugin_" not in cls.__module__] for some in known)
    _forget(kinds, encoders)
    yield
    _forget(kinds, encoders)


def _forget(kinds: Collection[str], encoders: Collection[str]) -> None:
    for kind in set(MODALITIES) - set(kinds):
        del MODALITIES[kind]
    for encoder in set(ENCODERS) - set(encoders):
        del ENCODERS[encoder]
    for name in [name for name in sys.modules if name.startswith("megatron_anymal_plugin_")]:
        del sys.modules[name]


def test_four_modalities_are_registered() -> None:
    assert set(MODALITIES) >= {"image", "video", "audio", "imu"}


def test_kind_defaults_to_the_sections_name() -> None:
    assert type(build_modality("image", section("clip", CLIP_SHAPE))) is MODALITIES["image"]
    config = section("clip", CLIP_SHAPE)
    config.kind = "video"
    assert type(build_modality("wrist_camera", config)) is MODALITIES["video"]


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model\.modalities\.imag: .*Did you mean 'image'"):
        build_modality("imag", section("clip", CLIP_SHAPE))


def test_unknown_option_names_section_and_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model\.modalities\.image: options\.max_gird .*Did you mean 'max_grid'"):
        build_modality("image", section("clip", CLIP_SHAPE, max_gird=2))


@pytest.mark.parametrize("value", ["2", True, 2.5, None, [2]])
def test_option_of_wrong_type(value: object) -> None:
    with pytest.raises(ConfigError, match=r"max_grid.*int"):
        build_modality("image", section("clip", CLIP_SHAPE, max_grid=value))


def test_int_stands_for_float_and_none_for_optional() -> None:
    modality = build_modality("video", section("clip", CLIP_SHAPE, clip_seconds=2, image_mean=None))
    assert modality.options.clip_seconds == 2


def test_second_class_of_one_kind_is_refused() -> None:
    register("image")(MODALITIES["image"])
    with pytest.raises(ConfigError, match=r"'image' is already"):
        register("image")(MODALITIES["audio"])


@pytest.mark.parametrize(
    ("extension", "kind"),
    [("jpg", "image"), (".JPG", "image"), ("left.png", "image"), ("mp4", "video"), ("csv", "imu")],
)
def test_kind_of_extension(extension: str, kind: str) -> None:
    assert kind_for_extension(extension, ["image", "video", "audio", "imu"]) == kind


def test_the_runs_limits_reach_the_modality() -> None:
    limits = LimitsConfig(max_pixels=7)
    assert build_modality("image", section("clip", CLIP_SHAPE), limits).limits is limits
    assert build_modality("image", section("clip", CLIP_SHAPE)).limits == LimitsConfig()


def test_a_plugin_whose_probe_takes_no_limits_is_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "depth.py"
    plugin.write_text(
        "from megatron_anymal.modalities import Modality, register\n"
        "@register('depth')\n"
        "class Depth(Modality):\n"
        "    @classmethod\n"
        "    def probe(cls, data, extension, attributes):\n"
        "        return 1.0, 1.0\n"
    )
    with pytest.raises(ConfigError, match=r"depth\.py.*probe needs a fourth parameter, `limits: LimitsConfig`"):
        load_plugins([str(plugin)])
    assert "depth" not in MODALITIES


def test_media_type_without_a_modality() -> None:
    with pytest.raises(MediaError, match=r"'xyz'.*known: .*jpg"):
        kind_for_extension("xyz", ["image"])
    with pytest.raises(MediaError, match=r"'flac'.*add a section model\.modalities\.audio"):
        kind_for_extension("flac", ["image"])


def test_ambiguous_extension_asks_for_the_modality() -> None:
    @register("depth")
    class Depth(IMUModality):
        """Also reads npy."""

    assert kind_for_extension("npy", ["imu"]) == "imu"
    with pytest.raises(MediaError, match=r"'npy' belongs to several modalities \(depth, imu\): state the modality"):
        kind_for_extension("npy", ["imu", "depth"])


def test_plugin_file_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.plugins: .*absent\.py"):
        load_plugins([str(tmp_path / "absent.py")])
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no camera')")
    with pytest.raises(ConfigError, match=r"broken\.py cannot be imported.*no camera"):
        load_plugins([str(broken)])


def test_thermal_plugin_prepares_a_piece_and_encodes_it() -> None:
    load_plugins([THERMAL, THERMAL])
    config = section("thermal_patches", {"width": 16, "patch_size": 4}, resolution=16)
    modality = build_modality("thermal", config)
    assert kind_for_extension("thermal.npy", ["imu", "thermal"]) == "thermal"
    picture = torch.full((24, 40), 20.0).numpy()
    pieces = modality.load(npy_bytes(picture), "thermal.npy", {})
    assert pieces.shape == (1, 1, 16, 16)
    torch.testing.assert_close(pieces, torch.full_like(pieces, 0.5))
    encoder = build_encoder(config.encoder, modality.piece_shape)
    features = encoder(pieces)
    assert features.shape == (1, encoder.feature_tokens, encoder.width) == (1, 16, 16)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.flops_per_piece() == 2 * 16 * (16 * 16 + 2 * 16 * 16)


def test_thermal_plugin_refuses_bad_input() -> None:
    load_plugins([THERMAL])
    modality = build_modality("thermal", section("thermal_patches", resolution=16))
    with pytest.raises(MediaError, match="shape"):
        modality.load(npy_bytes(torch.zeros(3, 4, 5).numpy()), "thermal.npy", {})
    with pytest.raises(MediaError, match=r"has 64 pixels \(8 x 8\), above data.limits.max_pixels=63"):
        MODALITIES["thermal"].probe(
            npy_bytes(torch.zeros(8, 8).numpy()), "thermal.npy", {}, LimitsConfig(max_pixels=63)
        )
    with pytest.raises(MediaError, match="non-finite values"):
        modality.load(npy_bytes(torch.full((8, 8), float("nan")).numpy()), "thermal.npy", {})
    with pytest.raises(ConfigError, match=r"encoder\.config\.widht.*'width'"):
        build_encoder(EncoderConfig(type="thermal_patches", config={"widht": 3}), (1, 16, 16))
