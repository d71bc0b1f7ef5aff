"""Encoders against transformers' models loaded directly, and FLOPs against torch's counter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.model.encoders import ENCODERS, build_encoder, register_encoder
from megatron_anymal.model.encoders.identity import IdentityEncoder
from megatron_anymal.model.encoders.imu import IMU2CLIPEncoder

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
CLIP = {**VIT, "intermediate_size": 48}
VIDEOMAE = {**CLIP, "num_frames": 4}
CLAP = {
    "spec_size": 64,
    "num_mel_bins": 32,
    "window_size": 4,
    "patch_embeds_hidden_size": 16,
    "hidden_size": 32,
    "depths": [2, 2],
    "num_attention_heads": [2, 4],
    "num_hidden_layers": 2,
}
# Encoder type -> shape, transformers' model and configuration classes, shape of one input.
CASES: dict[str, Any] = {
    "clip": (CLIP, transformers.CLIPVisionModel, transformers.CLIPVisionConfig, (3, 32, 32)),
    "dinov2": (VIT, transformers.Dinov2Model, transformers.Dinov2Config, (3, 32, 32)),
    "videomae": (VIDEOMAE, transformers.VideoMAEModel, transformers.VideoMAEConfig, (4, 3, 32, 32)),
    "clap": (CLAP, transformers.ClapAudioModel, transformers.ClapAudioConfig, (1, 60, 32)),
}
IMU = {"conv_width": 8, "kernel_sizes": [5, 3], "hidden_size": 16}


def save(type_name: str, folder: Path, **changes: Any) -> torch.nn.Module:
    """A transformers model with weights of noticeable size, saved to the folder."""
    shape, model_class, config_class, _ = CASES[type_name]
    torch.manual_seed(0)
    model = model_class(config_class(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def oracle(type_name: str, model: torch.nn.Module, pieces: torch.Tensor) -> torch.Tensor:
    """The documented features, computed with the transformers model."""
    hidden = model(pieces).last_hidden_state
    if type_name == "clap":
        return hidden.flatten(2).transpose(1, 2)
    return hidden if type_name == "videomae" else hidden[:, 1:]


@pytest.mark.parametrize("type_name", list(CASES))
def test_features_equal_transformers(type_name: str, tmp_path: Path) -> None:
    model = save(type_name, tmp_path)
    piece = CASES[type_name][3]
    encoder = build_encoder(EncoderConfig(type=type_name, path=str(tmp_path)), piece)
    pieces = torch.randn(3, *piece)
    with torch.no_grad():
        features = encoder(pieces)
        expected = oracle(type_name, model, pieces)
    assert features.shape == (3, encoder.feature_tokens, encoder.width)
    assert features.std() > 0.1
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("type_name", ["clip", "dinov2"])
def test_image_encoders_take_a_videos_frames_one_by_one(type_name: str) -> None:
    shape = CASES[type_name][0]
    torch.manual_seed(0)
    image = build_encoder(EncoderConfig(type=type_name, config=shape), (3, 32, 32))
    torch.manual_seed(0)
    video = build_encoder(EncoderConfig(type=type_name, config=shape), (5, 3, 32, 32))
    clips = torch.randn(2, 5, 3, 32, 32)
    frames = torch.cat([image(clips[:, frame]) for frame in range(5)], dim=1)
    assert video.feature_tokens == 5 * image.feature_tokens == 80
    torch.testing.assert_close(video(clips), frames, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("type_name", "whole"),
    [
        ("clip", lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config=CLIP,
                text_config={**CLIP, "vocab_size": 20, "max_position_embeddings": 8},
                projection_dim=8,
            )
        )),
        ("clap", lambda: transformers.ClapModel(
            transformers.ClapConfig(
                audio_config=CLAP,
                text_config={
                    "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "intermediate_size": 32, "max_position_embeddings": 8,
                },
                projection_dim=8,
            )
        )),
        ("videomae", lambda: transformers.VideoMAEForPreTraining(
            transformers.VideoMAEConfig(
                **VIDEOMAE, decoder_hidden_size=16, decoder_num_attention_heads=2, decoder_num_hidden_layers=1,
                decoder_intermediate_size=16,
            )
        )),
    ],
)  # fmt: skip
def test_the_encoder_is_taken_out_of_a_larger_model(type_name: str, whole: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = whole().eval()
    model.save_pretrained(tmp_path)
    part = {"clip": "vision_model", "clap": "audio_model", "videomae": "videomae"}[type_name]
    piece = CASES[type_name][3]
    encoder = build_encoder(EncoderConfig(type=type_name, path=str(tmp_path)), piece)
    pieces = torch.randn(2, *piece)
    expected = oracle(type_name, getattr(model, part), pieces)
    torch.testing.assert_close(encoder(pieces), expected, rtol=1e-5, atol=1e-5)


def test_fusing_clap_takes_its_single_view_path(tmp_path: Path) -> None:
    fusing = {"enable_fusion": True, "aff_block_r": 4}
    model = save("clap", tmp_path, **fusing)
    encoder = build_encoder(EncoderConfig(type="clap", path=str(tmp_path)), (4, 60, 32))
    pieces = torch.randn(2, 4, 60, 32)
    expected = model(pieces, is_longer=torch.zeros(2, 1, dtype=torch.bool)).last_hidden_state
    torch.testing.assert_close(encoder(pieces), expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_dinov2_takes_multiples_of_its_patch() -> None:
    encoder = build_encoder(EncoderConfig(type="dinov2", config=VIT), (3, 48, 48))
    assert encoder(torch.randn(1, 3, 48, 48)).shape == (1, 36, 32)
    with pytest.raises(ConfigError, match=r"options\.resolution"):
        build_encoder(EncoderConfig(type="dinov2", config=VIT), (3, 50, 50))


@pytest.mark.parametrize("type_name", [*CASES, "imu2clip"])
def test_every_weight_gets_a_gradient_and_the_type_follows(type_name: str) -> None:
    shape, piece = (IMU, (6, 60)) if type_name == "imu2clip" else (CASES[type_name][0], CASES[type_name][3])
    encoder = build_encoder(EncoderConfig(type=type_name, config=shape), piece)
    encoder(torch.randn(2, *piece)).square().sum().backward()
    # The bias of the keys has no effect on the softmax: its gradient is zero, but it is not missing.
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    encoder.to(torch.bfloat16)
    assert encoder(torch.randn(2, *piece)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("type_name", "extra"),
    [
        *((type_name, {}) for type_name in CASES),
        ("dinov2", {"use_swiglu_ffn": True}),
        ("clap", {"depths": [1, 1, 2], "num_attention_heads": [2, 2, 2]}),
    ],
)
def test_flops_equal_torchs_counter(type_name: str, extra: dict[str, Any]) -> None:
    shape, _, _, piece = CASES[type_name]
    encoder = build_encoder(EncoderConfig(type=type_name, config={**shape, **extra}), piece)
    counter = FlopCounterMode(display=False)
    # The counter does not count the CPU's fused attention kernel.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        encoder(torch.randn(2, *piece))
    assert encoder.flops_per_piece() * 2 == counter.get_total_flops()


def test_random_weights_follow_torchs_generator() -> None:
    config = EncoderConfig(type="clip", config=CLIP)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_encoder(config, (3, 32, 32)).state_dict())
    same = [torch.equal(states[0][name], states[1][name]) for name in states[0]]
    other = [torch.equal(states[0][name], states[2][name]) for name in states[0]]
    assert all(same) and not all(other)


def test_a_folder_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    bert = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.BertModel(bert).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as error:
        build_encoder(EncoderConfig(type="clip", path=str(tmp_path)), (3, 32, 32))
    assert str(tmp_path) in str(error.value) and "'bert'" in str(error.value)
    assert "'clip' or 'clip_vision_model'" in str(error.value)


def test_missing_folder_weights_and_keys_are_refused(tmp_path: Path) -> None:
    config = EncoderConfig(type="clip", path=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"absent.* is not a folder with a config\.json"):
        build_encoder(config, (3, 32, 32))
    save("clip", tmp_path)
    config.path = str(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    dropped = next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight"))
    save_file({name: value for name, value in weights.items() if name != dropped}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights .*layers\.1\.mlp\.fc1\.weight"):
        build_encoder(config, (3, 32, 32))
    save_file({**weights, dropped: weights[dropped][:4].clone()}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.fc1\.weight"):
        build_encoder(config, (3, 32, 32))
    file.write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_encoder(config, (3, 32, 32))
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_encoder(config, (3, 32, 32))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        build_encoder(config, (3, 32, 32))


@pytest.mark.parametrize(
    ("type_name", "shape", "piece", "message"),
    [
        ("clipp", {}, (3, 32, 32), "Did you mean 'clip'"),
        ("clip", {}, (3, 32, 32), r"encoder\.path is empty"),
        ("clip", {**CLIP, "hiden_size": 3}, (3, 32, 32), r"encoder\.config\.hiden_size.*'hidden_size'"),
        ("clip", {**CLIP, "hidden_size": 33}, (3, 32, 32), "not a multiple"),
        ("clip", {**CLIP, "hidden_size": "wide"}, (3, 32, 32), "hidden_size"),
        ("clip", CLIP, (3, 64, 64), r"\(3, 32, 32\).*\(3, 64, 64\)"),
        ("clip", CLIP, (6, 100), r"\(6, 100\)"),
        ("videomae", VIDEOMAE, (3, 32, 32), r"\(4, 3, 32, 32\)"),
        ("clap", CLAP, (60, 32), r"\(1, frames, 32\)"),
        ("clap", CLAP, (1, 500, 32), "takes 128 at most"),
        ("imu2clip", IMU, (3, 60), r"\(6, samples\)"),
        ("imu2clip", {}, (6, 60), r"Raise options\.piece_seconds"),
        ("imu2clip", {**IMU, "conv_width": 6}, (6, 60), "multiple of 4"),
        ("imu2clip", {**IMU, "kernel_sizes": []}, (6, 60), "kernel_sizes"),
        ("imu2clip", {**IMU, "hidden": 6}, (6, 60), r"encoder\.config\.hidden .*'hidden_size'"),
        ("identity", {"width": 3}, (6, 60), "neither weights"),
        ("identity", {}, (6,), "two dimensions"),
    ],
)
def test_impossible_sections(type_name: str, shape: dict[str, Any], piece: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(EncoderConfig(type=type_name, config=shape), piece)


def test_identity_passes_pieces_on() -> None:
    encoder = build_encoder(EncoderConfig(type="identity"), (2, 5, 7))
    pieces = torch.randn(3, 2, 5, 7)
    assert (encoder.feature_tokens, encoder.width, encoder.flops_per_piece()) == (10, 7, 0)
    assert torch.equal(encoder(pieces), pieces.reshape(3, 10, 7))
    assert encoder.to(torch.bfloat16)(pieces).dtype == torch.bfloat16
    assert not encoder.state_dict()


def test_imu2clip_sizes_are_the_published_ones() -> None:
    encoder = build_encoder(EncoderConfig(type="imu2clip"), (6, 1000))
    assert isinstance(encoder, IMU2CLIPEncoder)
    assert encoder.steps[-1] == 32 and encoder.width == 512 and encoder.feature_tokens == 1
    convolutions = 2 * (982 * 10 * 6 * 32 + 319 * 5 * 32 * 32 + 98 * 5 * 32 * 32)
    assert encoder.flops_per_piece() == convolutions + 2 * 32 * 3 * 512 * (32 + 512)


def test_imu2clip_tokens() -> None:
    one = build_encoder(EncoderConfig(type="imu2clip", config=IMU), (6, 60))
    many = build_encoder(EncoderConfig(type="imu2clip", config={**IMU, "feature_tokens": 3}), (6, 60))
    assert isinstance(one, IMU2CLIPEncoder)
    many.load_state_dict(one.state_dict())
    pieces = torch.randn(2, 6, 60)
    steps = one.gru(one.convolutions(pieces).transpose(1, 2))[0]
    torch.testing.assert_close(one(pieces)[:, 0], steps[:, -1])
    assert steps.shape[1] == 4 and many(pieces).shape == (2, 3, 16)
    torch.testing.assert_close(many(pieces)[:, 0], steps[:, :2].mean(1))
    # The group norm comes first, so the accelerometer's scale has no effect, not even on the gyroscope's channels.
    torch.testing.assert_close(one(pieces * 1000.0), one(pieces), rtol=1e-3, atol=1e-4)


def test_imu2clip_folder(tmp_path: Path) -> None:
    made = build_encoder(EncoderConfig(type="imu2clip", config=IMU), (6, 60))
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "imu2clip", **IMU}))
    config = EncoderConfig(type="imu2clip", path=str(tmp_path))
    pieces = torch.randn(2, 6, 60)
    assert torch.equal(build_encoder(config, (6, 60))(pieces), made(pieces))
    incomplete = {name: value for name, value in made.state_dict().items() if name != "gru.weight_hh_l0"}
    save_file(incomplete, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks weights .*gru\.weight_hh_l0"):
        build_encoder(config, (6, 60))
    save_file({**made.state_dict(), "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="unknown to the encoder: extra"):
        build_encoder(config, (6, 60))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ConfigError, match=r"'clip'.*'imu2clip'"):
        build_encoder(config, (6, 60))


def test_second_class_of_one_type_is_refused() -> None:
    class Other(IdentityEncoder):
        """Another class."""

    register_encoder("clip")(ENCODERS["clip"])
    with pytest.raises(ConfigError, match=r"'clip' is already"):
        register_encoder("clip")(Other)
