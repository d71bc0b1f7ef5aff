"""Encoders imported along with a Llama: features, preprocessing and every tensor match transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoint_tools.importing.encoders import import_encoder
from megatron_anymal.config import ConfigError, EncoderConfig, ModalityConfig
from megatron_anymal.modalities import build_modality
from megatron_anymal.model.encoders import build_encoder

VIT = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
TEXT = {
    "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 8,
}  # fmt: skip
CLAP = {
    "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 32, "window_size": 4, "hidden_size": 32,
    "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 4], "projection_dim": 8,
}  # fmt: skip
VIDEOMAE = {**VIT, "image_size": 16, "num_frames": 4, "tubelet_size": 2}
DECODER = {
    "decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 16,
}  # fmt: skip

# Name -> encoder type, model in the folder, its tower, shape of one input, parts that the import leaves out.
FOLDERS: dict[str, tuple[str, Any, str, tuple[int, ...], set[str]]] = {
    "clip": (
        "clip",
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)),
        "",
        (3, 32, 32),
        set(),
    ),
    "whole clip": (
        "clip",
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=VIT, text_config=TEXT, projection_dim=8)
        ),
        "vision_model",
        (3, 32, 32),
        {"text_model", "text_projection", "visual_projection", "logit_scale"},
    ),
    "dinov2": ("dinov2", lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VIT)), "", (3, 32, 32), set()),
    "videomae": (
        "videomae",
        lambda: transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**VIDEOMAE, **DECODER)),
        "videomae",
        (4, 3, 16, 16),
        {"decoder", "encoder_to_decoder", "mask_token"},
    ),
    "clap": ("clap", lambda: transformers.ClapAudioModel(transformers.ClapAudioConfig(**CLAP)), "", (1, 60, 32), set()),
    "whole clap": (
        "clap",
        lambda: transformers.ClapModel(transformers.ClapConfig(audio_config=CLAP, text_config=TEXT, projection_dim=8)),
        "audio_model",
        (1, 60, 32),
        {"text_model", "text_projection", "audio_projection", "logit_scale_a", "logit_scale_t"},
    ),
}  # fmt: skip


def saved(name: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = FOLDERS[name][1]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", list(FOLDERS))
def test_features_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    encoder_type, _, tower, piece, left_out = FOLDERS[name]
    model = saved(name, tmp_path / "source")
    lines = import_encoder("m", tmp_path / "source", tmp_path / "encoders" / "m")
    assert {line.split("left out ")[1].split(",")[0] for line in lines[1:]} - {"computed tensors"} == left_out
    encoder = build_encoder(EncoderConfig(type=encoder_type, path=str(tmp_path / "encoders" / "m")), piece)
    pieces = torch.randn(2, *piece)
    with torch.no_grad():
        hidden = (getattr(model, tower) if tower else model)(pieces).last_hidden_state
        expected = {"clap": lambda h: h.flatten(2).transpose(1, 2), "videomae": lambda h: h}.get(
            encoder_type, lambda h: h[:, 1:]
        )(hidden)
        torch.testing.assert_close(encoder(pieces), expected, rtol=1e-5, atol=1e-5)


def test_bytes_types_and_preprocessing_stay(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    saved("whole clip", source)
    half = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    described = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2}
    (source / "preprocessor_config.json").write_text(json.dumps(described))
    save_file({}, source / "model.bf16.safetensors")
    lines = import_encoder("image", source, target)
    assert "encoder image: left out model.bf16.safetensors, a variant in another type" in lines
    kept = load_file(target / "model.safetensors")
    assert kept.keys() == {name for name in half if name.startswith("vision_model.")}
    assert all(torch.equal(tensor, half[name]) and tensor.dtype == torch.float16 for name, tensor in kept.items())
    section = ModalityConfig(kind="image", encoder=EncoderConfig(type="clip", path=str(target)))
    pixels: Any = build_modality("image", section)
    assert pixels.pixels.mean.tolist() == pytest.approx(described["image_mean"])


def changed(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


BIAS, NORM = "vision_model.encoder.layers.1.mlp.fc1.bias", "vision_model.pre_layrnorm.bias"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {k: v for k, v in w.items() if k != BIAS}, r"lacks weights of the clip encoder.*fc1\.bias"),
        (
            lambda w: {**w, "vision_model.extra": torch.zeros(1)},
            r"'vision_model\.extra' in 'model\.safetensors' belongs",
        ),
        (lambda w: {**w, NORM: w[NORM][:1]}, r"in another shape: .*pre_layrnorm\.bias"),
    ],
)
def test_every_tensor_is_accounted_for(change: Any, says: str, tmp_path: Path) -> None:
    saved("whole clip", tmp_path / "source")
    changed(tmp_path / "source", change)
    with pytest.raises(ConfigError, match=says):
        import_encoder("image", tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ConfigError, match=r"--encoder image=.*'siglip'.*clip_vision_model"):
        import_encoder("image", tmp_path, tmp_path / "target")
