"""Models built from the assumed published shapes have the published parameter counts."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ClapConfig, ClapModel, LlamaForCausalLM

import megatron_anymal.model.encoders.imu as imu
from megatron_anymal.config import ConfigError, EncoderConfig, ModalityConfig, ModelConfig
from megatron_anymal.dry_run.published_models import ENCODERS, LLAMAS, assume_shapes
from megatron_anymal.modalities.architecture import ARCHITECTURES, transformers_config
from megatron_anymal.model.llama_shape import read_llama_config

# Parameters in the safetensors files of the repositories.
LLAMA_PARAMETERS = {
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-2-13b-chat-hf": 13_015_864_320,
    "Llama-2-70b-hf": 68_976_648_192,
    "Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "Meta-Llama-3-70B": 70_553_706_496,
    "Llama-3.1-8B": 8_030_261_248,
    "Meta-Llama-3.1-70B-Instruct": 70_553_706_496,
    "Llama-3.3-70B-Instruct": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B-Instruct": 3_212_749_824,
    "Yi-6B": 6_061_035_520,
}
# Vision and audio towers: OpenCLIP's table minus the final projection (303.97 M - 1024 x 768 and 1844.91 M - 1664 x
# 1280), DINOv2's safetensors, VideoMAE's paper (87 M and 305 M with a classifier and rounding).
TOWERS = {
    "clip-vit-large-patch14": (303.96e6 - 1024 * 768, 303.98e6 - 1024 * 768),
    # More positions: 24 x 24 patches instead of 16 x 16.
    "clip-vit-large-patch14-336": (303.96e6 - 1024 * 768 + 320 * 1024, 303.98e6 - 1024 * 768 + 320 * 1024),
    "CLIP-ViT-bigG-14": (1844.90e6 - 1664 * 1280, 1844.92e6 - 1664 * 1280),
    "dinov2-base": (86_580_480, 86_580_480),
    "dinov2-large": (304_368_640, 304_368_640),
    "dinov2-giant": (1_136_480_768, 1_136_480_768),
    "videomae-base": (85.5e6, 87.5e6),
    "videomae-large": (303.5e6, 305.5e6),
}
# Whole two-tower models; the text tower has transformers' defaults.
CLAPS = {"clap-htsat-fused": 153_507_530, "clap-htsat-unfused": 153_492_890}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assumed_llama(folder: str) -> ModelConfig:
    model = ModelConfig()
    model.language_model.path = f"nowhere/{folder}"
    return assume_shapes(model)[0]


def assumed_encoder(kind: str, folder: str) -> EncoderConfig:
    model = ModelConfig()
    model.modalities["media"] = ModalityConfig(encoder=EncoderConfig(type=kind, path=f"nowhere/{folder}"))
    return assume_shapes(model)[0].modalities["media"].encoder


@pytest.mark.parametrize("folder", LLAMA_PARAMETERS)
def test_llamas_have_their_published_size(folder: str) -> None:
    hf = read_llama_config(assumed_llama(folder).language_model)
    with torch.device("meta"):
        assert size(LlamaForCausalLM(hf)) == LLAMA_PARAMETERS[folder]


def test_every_llama_is_measured() -> None:
    assert all(any(folder in LLAMA_PARAMETERS for folder in model.folders) for model in LLAMAS)


@pytest.mark.parametrize("folder", TOWERS)
def test_vision_towers_have_their_published_size(folder: str) -> None:
    import transformers

    (kind,) = [kind for kind, models in ENCODERS.items() for model in models if folder in model.folders]
    shape = transformers_config(assumed_encoder(kind, folder))
    with torch.device("meta"):
        count = size(getattr(transformers, ARCHITECTURES[kind].model)(shape))
    assert TOWERS[folder][0] <= count <= TOWERS[folder][1]


@pytest.mark.parametrize("folder", CLAPS)
def test_claps_have_their_published_size(folder: str) -> None:
    audio = transformers_config(assumed_encoder("clap", folder))
    with torch.device("meta"):
        assert size(ClapModel(ClapConfig(audio_config=audio.to_dict(), text_config={}))) == CLAPS[folder]


def test_imu2clip_is_the_architecture_of_the_paper() -> None:
    assert assumed_encoder("imu2clip", "imu2clip").config == asdict(imu.IMU2CLIPShape())


def test_every_encoder_is_measured() -> None:
    folders = {folder for models in ENCODERS.values() for model in models for folder in model.folders}
    assert folders - {"imu2clip", "CLIP-ViT-bigG-14-laion2B-39B-b160k"} == TOWERS.keys() | CLAPS.keys()


def test_only_folders_that_are_not_there_are_replaced(tmp_path: Path) -> None:
    existing_folder = tmp_path / "clip-vit-large-patch14"
    existing_folder.mkdir()
    model = ModelConfig()
    model.language_model.path = "checkpoints/meta-llama-3-8b-INSTRUCT/"
    for name, kind, path in (
        ("image", "clip", str(existing_folder)),
        ("thermal", "clip", "checkpoints/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
        ("depth", "of_a_plug_in", "checkpoints/depth"),
        ("audio", "identity", ""),
    ):
        model.modalities[name] = ModalityConfig(encoder=EncoderConfig(type=kind, path=path))
    before = copy.deepcopy(model)
    assumed, notes = assume_shapes(model)
    assert model == before
    lm, encoders = assumed.language_model, {name: m.encoder for name, m in assumed.modalities.items()}
    assert (lm.path, lm.load_weights, lm.config["hidden_size"]) == ("", False, 4096)
    assert encoders["thermal"].path == "" and encoders["thermal"].config["num_hidden_layers"] == 48
    for name in ("image", "depth", "audio"):
        assert encoders[name] == before.modalities[name].encoder
    assert notes == [
        "checkpoints/meta-llama-3-8b-INSTRUCT/ is not on this machine: taken as Llama-3 8B's published shape",
        "checkpoints/CLIP-ViT-bigG-14-laion2B-39B-b160k is not on this machine: taken as OpenCLIP ViT-bigG/14's "
        "published shape",
    ]


def test_the_shapes_handed_out_are_copies() -> None:
    assumed_llama("Llama-3.1-8B").language_model.config["rope_parameters"]["factor"] = 1.0
    assert assumed_llama("Llama-3.1-8B").language_model.config["rope_parameters"]["factor"] == 8.0


def test_an_unknown_name_says_what_a_dry_run_needs() -> None:
    with pytest.raises(
        ConfigError, match=r"language_model\.path='nowhere/Meta-Llama-3-9B'.*config\.json.*Did you mean"
    ):
        assumed_llama("Meta-Llama-3-9B")
    # A model of another type is not accepted here.
    with pytest.raises(ConfigError, match=r"modalities\.media\.encoder\.path='nowhere/dinov2-giant'.*clip-vit-large"):
        assumed_encoder("clip", "dinov2-giant")
