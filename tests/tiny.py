"""Tiny tokenizers, shards and configurations shared by many tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_anymal.config import (
    DatasetConfig,
    EncoderConfig,
    ModalityConfig,
    ProjectorConfig,
    RunConfig,
)
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import write_shards

WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "what",
    "is",
    "this",
    "a",
    "sound",
    "of",
    "motion",
    "walk",
    "run",
]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
# Tokens of Llama 3's chat format; placed after the words so that the ids of the words do not change.
CHAT = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


def make_tokenizer(folder: Path) -> str:
    """Write a word-level tokenizer with Llama 3's special tokens; return its folder."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, "<unk>", *WORDS, *CHAT])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=[*SPECIAL[2:], *CHAT],
    )
    fast.save_pretrained(str(folder))
    return str(folder)


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def flac(seed: int, seconds: float = 0.5, rate: int = 8000) -> bytes:
    """A FLAC file of random noise."""
    out = io.BytesIO()
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))
    soundfile.write(out, noise, rate, format="FLAC")
    return out.getvalue()


def npy(seed: int, steps: int = 50) -> bytes:
    """An npy file of random IMU signals."""
    out = io.BytesIO()
    np.save(out, np.random.default_rng(seed).normal(size=(steps, 6)).astype(np.float32))
    return out.getvalue()


MEDIA: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "image": ("png", png, {}),
    "audio": ("flac", flac, {}),
    "imu": ("npy", npy, {"rate": 50}),
}


def make_shards(
    folder: Path,
    tokenizer: str,
    count: int,
    kinds: tuple[str, ...] = ("image", "audio", "imu", "text"),
    seed: int = 0,
    makers: dict[str, tuple[str, Any, dict[str, Any]]] = MEDIA,
) -> str:
    """Write `count` samples that cycle through `kinds`; "mixed" has an image and a sound between texts.

    Args:
        makers: kind -> (file extension, function from seed to bytes, attributes).
    """
    rng = np.random.default_rng(seed)
    source = folder.with_name(folder.name + "_source")
    source.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        words = " ".join(rng.choice(WORDS, size=int(rng.integers(2, 9))))
        parts: list[dict[str, Any]] = []
        for name in {"mixed": ("image", "audio"), "text": ()}.get(kind, (kind,)):
            ending, maker, attributes = makers[name]
            path = source / f"{number}-{name}.{ending}"
            path.write_bytes(maker(seed * 10_000 + number))
            parts += [{"media": path.name, "modality": name, **attributes}, {"text": "what is this", "loss": False}]
        lines.append({"key": f"{kind}-{number:05d}", "parts": [*parts, {"text": words}]})
    manifest = source / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_shards(str(manifest), str(folder), samples_per_shard=max(8, count // 3), overwrite=True)
    make_index(str(folder), IndexOptions(tokenizer))
    return str(folder)


def make_conversations(
    folder: Path,
    tokenizer: str,
    count: int,
    kinds: tuple[str, ...] = ("image", "audio", "imu", "text"),
    *,
    pairs: bool = False,
    makers: dict[str, tuple[str, Any, dict[str, Any]]] = MEDIA,
) -> str:
    """Write one- or two-turn conversations about media that cycle through `kinds`, or preference pairs about them."""
    rng = np.random.default_rng(0)

    def words() -> str:
        return " ".join(rng.choice(WORDS, size=int(rng.integers(1, 6))))

    source = folder.with_name(folder.name + "_source")
    source.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        content: list[dict[str, Any]] = [{"text": words()}]
        for name in {"mixed": ("image", "audio"), "text": ()}.get(kind, (kind,)):
            ending, maker, attributes = makers[name]
            path = source / f"{number}-{name}.{ending}"
            path.write_bytes(maker(number))
            content.append({"media": path.name, "modality": name, **attributes})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if number % 3 == 0:
            messages += [{"role": "assistant", "content": words()}, {"role": "user", "content": words()}]
        if pairs:
            answers: dict[str, Any] = {"chosen": words() + " seven", "rejected": words() + " nine"}
        else:
            answers = {}
            messages.append({"role": "assistant", "content": words()})
        lines.append({"key": f"{kind}-{number:05d}", "messages": messages, **answers})
    manifest = source / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_shards(str(manifest), str(folder), samples_per_shard=max(8, count // 3), overwrite=True)
    make_index(str(folder), IndexOptions(tokenizer))
    return str(folder)


# Shape of a video encoder of one layer.
VIDEOMAE = {
    "image_size": 8,
    "patch_size": 4,
    "num_frames": 2,
    "tubelet_size": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def modalities() -> dict[str, ModalityConfig]:
    """Small image, audio and IMU sections; the IMU encoder is trainable."""
    return {
        "image": ModalityConfig(
            encoder=EncoderConfig(
                type="clip",
                config={
                    "image_size": 8,
                    "patch_size": 4,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                },
            ),
            projector=ProjectorConfig(
                type="resampler", num_layers=1, num_tokens=2, hidden_size=16, num_attention_heads=4, ffn_multiplier=2
            ),
            placeholder=SPECIAL[2],
        ),
        "audio": ModalityConfig(
            encoder=EncoderConfig(type="identity"),
            projector=ProjectorConfig(type="linear", num_layers=1, num_tokens=2),
            options={
                "piece_seconds": 0.5,
                "sampling_rate": 8000,
                "n_mels": 8,
                "hop_length": 400,
                "fft_window_size": 512,
            },
            placeholder=SPECIAL[3],
        ),
        "imu": ModalityConfig(
            encoder=EncoderConfig(
                type="imu2clip",
                config={"conv_width": 8, "hidden_size": 8, "kernel_sizes": [5], "dilation": 1},
                freeze=False,
            ),
            projector=ProjectorConfig(type="linear", num_layers=1, num_tokens=2),
            options={"rate": 50, "piece_seconds": 1.0},
            placeholder=SPECIAL[4],
        ),
    }


def make_config(data: str, tokenizer: str, run_dir: Path) -> RunConfig:
    """A single-process fp32 run with three modalities."""
    config = RunConfig()
    config.trainer.precision = "32"
    config.trainer.max_steps = 6
    config.trainer.log_every_n_steps = 1
    config.trainer.val_check_interval = 0
    config.exp_manager.explicit_log_dir = str(run_dir)
    config.exp_manager.checkpoint.every_n_train_steps = 3
    config.model.language_model.config = dict(LLAMA)
    config.model.modalities = modalities()
    config.model.global_batch_size = 8
    config.model.optim.lr = 1e-2
    config.data.train = {"mix": DatasetConfig(path=data)}
    config.data.tokenizer = tokenizer
    config.data.seq_length = 64
    config.data.num_workers = 0
    return config
