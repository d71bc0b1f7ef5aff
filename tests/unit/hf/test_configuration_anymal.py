"""The configuration and sections of an export survive saving and loading."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_parts import CLAP, ROPE, VIDEOMAE, VISION, make_config, make_model, sections
from tiny import LLAMA, modalities
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
)

from megatron_anymal.config import EncoderConfig, ModalityConfig
from megatron_anymal.data.records import DataError
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.hf.configuration_anymal import AnyMALConfig, modality_config
from megatron_anymal.hf.modality_configs import export_sections
from megatron_anymal.hf.modeling_anymal import AnyMALForConditionalGeneration
from megatron_anymal.modalities import build_modality
from megatron_anymal.modalities.architecture import transformers_config


def test_a_configuration_comes_back(tokenizer_folder: str, tmp_path: Path) -> None:
    config = make_config(sections("towers"), tokenizer_folder)
    config.save_pretrained(tmp_path)
    again = AnyMALConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.text_config, LlamaConfig)
    assert again.get_text_config() is again.text_config
    assert again.text_config.to_dict() == config.text_config.to_dict()
    assert (again.bos_token_id, again.eos_token_id, again.vocab_size) == (0, [1, 28], 32)
    assert again.tie_word_embeddings is False
    assert AnyMALConfig(LlamaConfig(**{**LLAMA, "tie_word_embeddings": True})).tie_word_embeddings


def test_a_rotary_embedding_is_written_for_every_version(tokenizer_folder: str, tmp_path: Path) -> None:
    make_config(sections("towers"), tokenizer_folder).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["text_config"]
    # transformers 4 reads only these, and would silently use its defaults otherwise.
    scaling = {key: value for key, value in ROPE.items() if key != "rope_theta"}
    assert written["rope_theta"] == ROPE["rope_theta"] and written["rope_scaling"] == scaling
    assert written["rope_parameters"] == ROPE
    del written["rope_parameters"]
    assert AnyMALConfig(written).text_config.rope_parameters == ROPE
    plain = AnyMALConfig(LlamaConfig(**LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 7.0})).to_dict()
    assert (plain["text_config"]["rope_theta"], plain["text_config"]["rope_scaling"]) == (7.0, None)


@pytest.mark.parametrize("variant", ["towers", "others"])
def test_sections_rebuild_the_modalities(variant: str, tokenizer_folder: str) -> None:
    own = sections(variant)
    exported = export_sections(own, Tokenizer(tokenizer_folder))
    assert json.loads(json.dumps(exported)) == exported
    for name, section in own.items():
        rebuilt = modality_config(exported[name])
        assert rebuilt.kind == name and rebuilt.placeholder == section.placeholder
        assert rebuilt.options == section.options
        assert dataclasses.replace(rebuilt.projector, freeze=section.projector.freeze) == section.projector
        assert rebuilt.encoder.max_pieces_per_call == section.encoder.max_pieces_per_call
        if section.encoder.type in ("clip", "dinov2", "videomae", "clap"):
            theirs, ours = transformers_config(rebuilt.encoder), transformers_config(section.encoder)
            assert theirs.to_dict() == ours.to_dict()
        else:
            assert rebuilt.encoder.config == section.encoder.config
        assert build_modality(name, rebuilt).piece_shape == build_modality(name, section).piece_shape
    assert [section["placeholder_id"] for section in exported.values()] == [2, 3, 4, 5]


def test_an_encoders_folder_is_written_into_its_section(tokenizer_folder: str, tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**VISION, intermediate_size=24, hidden_act="gelu")).save_pretrained(tmp_path)
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], resample=2).save_pretrained(tmp_path)
    section = modalities()["image"]
    section.kind, section.encoder = "image", EncoderConfig(type="clip", path=str(tmp_path))
    exported = export_sections({"photo": section}, Tokenizer(tokenizer_folder))["photo"]
    rebuilt = modality_config(exported)
    assert rebuilt.kind == "image" and rebuilt.encoder.path == ""
    shape = transformers_config(rebuilt.encoder)
    assert (shape.intermediate_size, shape.hidden_act, shape.image_size) == (24, "gelu", 8)
    pixels: Any = build_modality("photo", rebuilt)
    assert pixels.pixels.mean.tolist() == pytest.approx([0.1, 0.2, 0.3]) and pixels.pixels.resample == 2


def test_an_imu_encoders_folder_is_written_into_its_section(tokenizer_folder: str, tmp_path: Path) -> None:
    shape = {"conv_width": 8, "hidden_size": 12, "kernel_sizes": [5]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "imu2clip", **shape}))
    section = modalities()["imu"]
    section.encoder = EncoderConfig(type="imu2clip", path=str(tmp_path))
    assert export_sections({"imu": section}, Tokenizer(tokenizer_folder))["imu"]["encoder"]["config"] == shape


def test_a_placeholder_that_the_tokenizer_lacks_is_refused(tokenizer_folder: str) -> None:
    section = ModalityConfig(encoder=EncoderConfig(type="identity"), placeholder="<none>")
    with pytest.raises(DataError, match=r"model.modalities.imu.placeholder='<none>' is not in the tokenizer"):
        export_sections({"imu": section}, Tokenizer(tokenizer_folder))


def test_shapes_hold_what_the_encoders_have_alone(tokenizer_folder: str) -> None:
    own = sections("towers")
    own["image"].encoder = EncoderConfig(type="dinov2", config=VISION)
    exported = export_sections(own, Tokenizer(tokenizer_folder))
    common = set(PretrainedConfig().to_dict())
    for name, given in (("image", VISION), ("video", VIDEOMAE), ("audio", CLAP)):
        shape = exported[name]["encoder"]["config"]
        assert given.items() <= shape.items() and not common & shape.keys()


@pytest.mark.parametrize("variant", ["towers", "others"])
def test_a_model_comes_back(variant: str, tokenizer_folder: str, tmp_path: Path) -> None:
    tied = variant == "others"
    model = make_model(make_config(sections(variant), tokenizer_folder, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    again, loading_info = AnyMALForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading_info.values()), loading_info
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert again.generation_config.suppress_tokens == [2, 3, 4, 5]
    assert isinstance(again.generation_config, GenerationConfig)
    for settings, dtype in (({"dtype": torch.bfloat16}, torch.bfloat16), ({"dtype": "auto"}, torch.float32)):
        loaded = AnyMALForConditionalGeneration.from_pretrained(tmp_path, **settings)
        assert {tensor.dtype for tensor in loaded.parameters()} == {dtype}
        assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
