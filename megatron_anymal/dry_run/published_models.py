"""Shapes of published models, by the name of their HuggingFace folder.

A dry run uses them to check a run whose models have not been downloaded yet. A run itself never uses them: it reads the
model folders.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_anymal.config import ConfigError, ModelConfig


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        title: display name.
        folders: names of the HuggingFace repositories that hold this shape, without their owner.
        shape: keys of a LlamaConfig, or of the encoder type's own configuration, that differ from its defaults.
    """

    title: str
    folders: tuple[str, ...]
    shape: dict[str, Any]


def _llama(hidden: int, intermediate: int, layers: int, heads: int, groups: int, **rest: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-5,
        **rest,
    }


def _longer_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_LLAMA_2: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA_3: dict[str, Any] = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_LLAMA_3_1: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": _longer_rope(8.0),
}
_LLAMA_3_2 = {**_LLAMA_3_1, "rope_parameters": _longer_rope(32.0), "tie_word_embeddings": True}

LLAMAS = (
    Published("Llama-2 7B", ("Llama-2-7b-hf", "Llama-2-7b-chat-hf"), _llama(4096, 11008, 32, 32, 32, **_LLAMA_2)),
    Published("Llama-2 13B", ("Llama-2-13b-hf", "Llama-2-13b-chat-hf"), _llama(5120, 13824, 40, 40, 40, **_LLAMA_2)),
    Published("Llama-2 70B", ("Llama-2-70b-hf", "Llama-2-70b-chat-hf"), _llama(8192, 28672, 80, 64, 8, **_LLAMA_2)),
    Published(
        "Llama-3 8B", ("Meta-Llama-3-8B", "Meta-Llama-3-8B-Instruct"), _llama(4096, 14336, 32, 32, 8, **_LLAMA_3)
    ),
    Published(
        "Llama-3 70B", ("Meta-Llama-3-70B", "Meta-Llama-3-70B-Instruct"), _llama(8192, 28672, 80, 64, 8, **_LLAMA_3)
    ),
    Published(
        "Llama-3.1 8B",
        ("Llama-3.1-8B", "Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B", "Meta-Llama-3.1-8B-Instruct"),
        _llama(4096, 14336, 32, 32, 8, **_LLAMA_3_1),
    ),
    Published(
        "Llama-3.1 70B",
        ("Llama-3.1-70B", "Llama-3.1-70B-Instruct", "Meta-Llama-3.1-70B", "Meta-Llama-3.1-70B-Instruct"),
        _llama(8192, 28672, 80, 64, 8, **_LLAMA_3_1),
    ),
    Published("Llama-3.3 70B", ("Llama-3.3-70B-Instruct",), _llama(8192, 28672, 80, 64, 8, **_LLAMA_3_1)),
    Published(
        "Llama-3.2 1B",
        ("Llama-3.2-1B", "Llama-3.2-1B-Instruct"),
        _llama(2048, 8192, 16, 32, 8, head_dim=64, **_LLAMA_3_2),
    ),
    Published(
        "Llama-3.2 3B",
        ("Llama-3.2-3B", "Llama-3.2-3B-Instruct"),
        _llama(3072, 8192, 28, 24, 8, head_dim=128, **_LLAMA_3_2),
    ),
    # Of Llama's architecture; MIO's base.
    Published(
        "Yi 6B",
        ("Yi-6B", "Yi-6B-Chat"),
        _llama(4096, 11008, 32, 32, 4, vocab_size=64000, max_position_embeddings=4096, rope_theta=5000000.0),
    ),
)


def _vit(hidden: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, **rest}


_CLIP_L14 = _vit(1024, 24, 16, intermediate_size=4096, patch_size=14, projection_dim=768)

# By encoder.type; two-tower models are represented by their vision or audio tower.
ENCODERS = {
    "clip": (
        Published("CLIP ViT-L/14", ("clip-vit-large-patch14",), _CLIP_L14),
        Published("CLIP ViT-L/14 at 336 pixels", ("clip-vit-large-patch14-336",), {**_CLIP_L14, "image_size": 336}),
        Published(
            "OpenCLIP ViT-bigG/14",
            ("CLIP-ViT-bigG-14", "CLIP-ViT-bigG-14-laion2B-39B-b160k"),
            # The activation is GELU; OpenAI's CLIP uses the quick_gelu approximation.
            _vit(1664, 48, 16, intermediate_size=8192, patch_size=14, projection_dim=1280, hidden_act="gelu"),
        ),
    ),
    "dinov2": (
        Published("DINOv2 ViT-B/14", ("dinov2-base",), _vit(768, 12, 12, image_size=518)),
        Published("DINOv2 ViT-L/14", ("dinov2-large",), _vit(1024, 24, 16, image_size=518)),
        Published("DINOv2 ViT-g/14", ("dinov2-giant",), _vit(1536, 40, 24, image_size=518, use_swiglu_ffn=True)),
    ),
    "videomae": (
        Published("VideoMAE ViT-B", ("videomae-base",), _vit(768, 12, 12, intermediate_size=3072)),
        Published("VideoMAE ViT-L", ("videomae-large",), _vit(1024, 24, 16, intermediate_size=4096)),
    ),
    "clap": (
        Published("CLAP HTSAT with fusion", ("clap-htsat-fused",), {"enable_fusion": True}),
        Published("CLAP HTSAT without fusion", ("clap-htsat-unfused",), {"enable_fusion": False}),
    ),
    "imu2clip": (
        Published(
            "IMU2CLIP",
            ("imu2clip",),
            {
                "channels": 6,
                "conv_width": 32,
                "kernel_sizes": [10, 5, 5],
                "dilation": 2,
                "pool": 3,
                "hidden_size": 512,
                "num_layers": 1,
                "feature_tokens": 1,
            },
        ),
    ),
}


def assume_shapes(model: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """Substitute the published shape for every model folder that is not on this machine.

    Returns:
        A copy of the section, and a line for each folder that was replaced.

    Raises:
        ConfigError: a folder is missing and its name is not that of a published model.
    """
    model = copy.deepcopy(model)
    notes = []
    lm = model.language_model
    if lm.path and not Path(lm.path).exists():
        published = _named(lm.path, LLAMAS, "model.language_model.path")
        notes.append(_note(lm.path, published))
        lm.path, lm.config, lm.load_weights = "", copy.deepcopy(published.shape), False
    for name, section in model.modalities.items():
        encoder = section.encoder
        # A plug-in's encoder reads its folder itself.
        if encoder.path and not Path(encoder.path).exists() and encoder.type in ENCODERS:
            published = _named(encoder.path, ENCODERS[encoder.type], f"model.modalities.{name}.encoder.path")
            notes.append(_note(encoder.path, published))
            encoder.path, encoder.config = "", copy.deepcopy(published.shape)
    return model, notes


def _named(path: str, known: Sequence[Published], key: str) -> Published:
    wanted = Path(path).name.lower()
    by_folder = {folder.lower(): model for model in known for folder in model.folders}
    if wanted in by_folder:
        return by_folder[wanted]
    names = {folder.lower(): folder for model in known for folder in model.folders}
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"Did you mean {names[near[0]]}? " if near else ""
    listed = ", ".join(model.folders[0] for model in known)
    raise ConfigError(
        f"{key}={path!r} is not on this machine. A dry run needs at least the folder's config.json, or a folder named "
        f"like a published model. {hint}Known: {listed}, and their variants."
    )


def _note(path: str, published: Published) -> str:
    return f"{path} is not on this machine: taken as {published.title}'s published shape"
