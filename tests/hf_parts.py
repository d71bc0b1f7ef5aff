"""Tiny HuggingFace-style models with media and prompts."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from tiny import CHAT, LLAMA, SPECIAL, flac, modalities, npy, png
from transformers import GenerationConfig, LlamaConfig

from megatron_anymal.config import DiscreteConfig, EncoderConfig, ModalityConfig, ProjectorConfig
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.hf.configuration_anymal import AnyMALConfig
from megatron_anymal.hf.modality_configs import export_discrete, export_sections
from megatron_anymal.hf.modeling_anymal import AnyMALForConditionalGeneration
from megatron_anymal.hf.remote_code import ARCHITECTURE, CONFIG_AUTO_MAP, PROCESSOR_AUTO_MAP, write_code

VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIDEOMAE = {**VISION, "intermediate_size": 32, "num_frames": 4}
CLAP = {
    "num_mel_bins": 8,
    "spec_size": 32,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "patch_embeds_hidden_size": 8,
    "hidden_size": 16,
    "window_size": 2,
    "num_hidden_layers": 2,
    "projection_dim": 8,
}
LOG_MEL = {"piece_seconds": 0.5, "sampling_rate": 8000, "hop_length": 400, "fft_window_size": 512}
# A rotary embedding other than the default one, as in Llama 3.1.
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def projector(kind: str, **sizes: int) -> ProjectorConfig:
    """A small projector."""
    given = {"num_layers": 2, "num_tokens": 2, "hidden_size": 16, "num_attention_heads": 4, "ffn_multiplier": 2}
    return ProjectorConfig(type=kind, **{**given, **sizes})


def sections(variant: str) -> dict[str, ModalityConfig]:
    """Image, video, audio and IMU sections; together the variants cover every encoder, and both projectors per
    modality.

    There are more encoder inputs than one call of the encoder takes.
    """
    modality_configs = modalities()
    modality_configs["video"] = ModalityConfig(placeholder=SPECIAL[5])
    if variant == "towers":
        modality_configs["image"].encoder.max_pieces_per_call = 2
        modality_configs["video"].encoder = EncoderConfig(type="videomae", config=VIDEOMAE)
        modality_configs["video"].projector = projector("resampler")
        modality_configs["video"].options = {"clip_seconds": 1.0}
        modality_configs["audio"].encoder = EncoderConfig(type="clap", config=CLAP)
        modality_configs["audio"].projector = projector("linear", num_tokens=6)
        modality_configs["audio"].options = dict(LOG_MEL)
        modality_configs["imu"].projector = projector("resampler", num_tokens=3)
    else:
        modality_configs["image"].encoder = EncoderConfig(type="dinov2", config=VISION)
        modality_configs["image"].projector = projector("linear", num_tokens=3)
        modality_configs["video"].encoder = copy.deepcopy(modalities()["image"].encoder)
        modality_configs["video"].projector = projector("linear", num_tokens=1, num_layers=1)
        modality_configs["video"].options = {"clip_seconds": 1.0, "num_frames": 2}
        modality_configs["audio"].projector = projector("resampler")
        modality_configs["imu"].encoder = EncoderConfig(type="identity")
    return modality_configs


def video(seed: int, frames: int = 25) -> bytes:
    """Noise at 10 frames per second."""
    import av

    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w") as output:
            stream = output.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for _ in range(frames):
                picture = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode(None))
        return path.read_bytes()


def write_media(folder: Path) -> dict[str, str]:
    """Write files with several encoder inputs each, some kinds with a second file of another size; kind or kind_b ->
    path."""
    made = {
        "image": ("a.png", png(1, (17, 9))),
        "video": ("a.mp4", video(1)),
        "audio": ("a.flac", flac(1, 1.3)),
        "imu": ("a.npy", npy(1, 120)),
        "image_b": ("b.png", png(2, (9, 12))),
        "audio_b": ("b.flac", flac(2, 0.7)),
        "imu_b": ("b.npy", npy(2, 60)),
    }
    for name, data in made.values():
        (folder / name).write_bytes(data)
    return {kind: str(folder / name) for kind, (name, _) in made.items()}


def prompts_about(files: dict[str, str]) -> list[dict[str, Any]]:
    """All kinds together, a conversation, text only, one kind twice: rows of different lengths."""
    imu = {"media": files["imu"], "rate": 50}
    everything = [{"media": files["image"]}, {"text": "what is this"}, {"media": files["audio"]}, {"text": "a sound"}]
    turn = [
        {"media": files["audio_b"], "modality": "audio"},
        {"text": " what <|eot_id|> is "},
        {"media": files["image_b"]},
    ]
    messages = [
        {"role": "system", "content": "a motion"},
        {"role": "user", "content": turn},
        {"role": "assistant", "content": "a run"},
        {"role": "user", "content": "what is this"},
    ]
    return [
        {"parts": [*everything, imu, {"media": files["video"]}]},
        {"messages": messages},
        {"parts": [{"text": "zero one"}]},
        {"parts": [{"media": files["imu_b"], "rate": 50}, {"text": "two"}, imu]},
    ]


def make_config(
    modality_sections: dict[str, ModalityConfig],
    tokenizer: str,
    discrete: Optional[dict[str, DiscreteConfig]] = None,
    **llama: Any,
) -> AnyMALConfig:
    """A configuration like that of an export."""
    loaded = Tokenizer(tokenizer)
    ends = [loaded.end, loaded.hf.convert_tokens_to_ids(CHAT[2])]
    base = LLAMA["vocab_size"]
    total = DiscreteVocabulary(base, discrete or {}).total_size
    rest = {"rope_parameters": ROPE, "bos_token_id": 0, "eos_token_id": 1, "vocab_size": total}
    text = LlamaConfig(**{**LLAMA, **rest, **llama})
    sections = export_sections(modality_sections, loaded)
    made = AnyMALConfig(text.to_dict(), sections, export_discrete(base, discrete or {}), eos_token_id=ends)
    made.auto_map, made.architectures, made.dtype = dict(CONFIG_AUTO_MAP), [ARCHITECTURE], "float32"
    return made


def make_model(config: AnyMALConfig, std: float = 0.5) -> AnyMALForConditionalGeneration:
    """A model with random weights; the Llama's are large enough for varied answers."""
    torch.manual_seed(3)
    model = AnyMALForConditionalGeneration(config).eval()
    for name, tensor in model.named_parameters():
        if name.startswith("language_model.") and tensor.dim() > 1:
            torch.nn.init.normal_(tensor, std=std)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    model.generation_config = GenerationConfig(
        bos_token_id=0,
        eos_token_id=config.eos_token_id,
        pad_token_id=1,
        suppress_tokens=[section["placeholder_id"] for section in config.modalities.values()],
    )
    return model


def write_export(
    folder: Path, model: AnyMALForConditionalGeneration, tokenizer: str, plugins: Sequence[Path] = ()
) -> None:
    """Write a folder like an export."""
    model.save_pretrained(folder)
    processor = {
        "processor_class": "AnyMALProcessor",
        "auto_map": PROCESSOR_AUTO_MAP,
        "modalities": model.config.modalities,
        "discrete": model.config.discrete,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    for file in Path(tokenizer).iterdir():
        shutil.copy(file, folder)
    write_code(folder, plugins)
