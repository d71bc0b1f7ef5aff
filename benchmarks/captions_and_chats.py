"""Data and configuration of the cases "alignment" and "sft" of benchmarks/step_vs_transformers.py.

A frozen Llama with random weights and media of 64 soft tokens: captions, on which a Perceiver resampler trains, or
conversations, on which it trains together with adapters of rank 8 on all linear layers (AnyMAL section 4). Features
are given (an identity encoder), as if they came from the feature cache. Texts are random words of realistic lengths.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from anymal_side import PIECE, LlamaDimensions, write_tokenizer
from sample_texts import SAMPLES

from megatron_anymal.config import (
    DatasetConfig,
    EncoderConfig,
    LoraConfig,
    ModalityConfig,
    ProjectorConfig,
    RunConfig,
)
from megatron_anymal.data.chat_format import CHAT_TOKENS
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import write_shards

BEGIN, *OTHERS = CHAT_TOKENS
PLACEHOLDER = "<|reserved_special_token_0|>"
SPECIAL = (BEGIN, "<|end_of_text|>", PLACEHOLDER, *OTHERS)
# Samples of about 210 and 320 tokens that fill a pack of 2,048, by job.
FULL_PACK = {"pretrain": 9, "sft": 6}


@dataclass(frozen=True)
class MixedSizes(LlamaDimensions):
    """Sizes of the Llama and of a step; every field is an argument of the command."""

    vocabulary: int = 32_000
    """Size of the vocabulary."""
    seq_length: int = 2048
    """Longest document and longest pack, in tokens."""
    documents: int = 0
    """Samples per step; 0: about as many as fill a pack of 2,048 tokens."""
    soft_tokens: int = 64
    """Soft tokens of a media item."""
    text_divisor: int = 1
    """Texts are this many times shorter than realistic ones."""


def make_case(folder: Path, job: str, sizes: MixedSizes, steps: int) -> RunConfig:
    """Write a tokenizer and shards with the samples of `steps` steps; return the configuration of a job on them.

    Args:
        job: pretrain or sft.
    """
    folder.mkdir()
    documents = sizes.documents or FULL_PACK[job]
    _write_data(folder, job, sizes, documents * steps)
    config = RunConfig()
    config.job = job
    config.trainer.precision = "32"
    config.model.transformer_impl = "local"
    config.model.language_model.config = {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "intermediate_size": sizes.ffn,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.seq_length,
        "tie_word_embeddings": False,
    }
    config.model.modalities["imu"] = ModalityConfig(
        encoder=EncoderConfig(type="identity"),
        projector=ProjectorConfig(num_layers=2, num_tokens=sizes.soft_tokens, hidden_size=128, num_attention_heads=4),
        options={"rate": float(PIECE[1]), "piece_seconds": 1.0},
        placeholder=PLACEHOLDER,
    )
    if job == "sft":
        config.model.lora = LoraConfig(r=8, alpha=32.0)
    config.model.global_batch_size = documents
    config.data.train = {job: DatasetConfig(path=str(folder / "shards"))}
    config.data.tokenizer = str(folder / "tokenizer")
    config.data.seq_length = sizes.seq_length
    config.data.num_workers = 0
    return config


def _write_data(folder: Path, job: str, sizes: MixedSizes, count: int) -> None:
    words = write_tokenizer(folder / "tokenizer", SPECIAL, sizes.vocabulary)
    rng = np.random.default_rng(0)
    source = folder / "source"
    source.mkdir()

    def text(shortest: int, longest: int) -> str:
        length = int(rng.integers(shortest, longest + 1)) // sizes.text_divisor
        return " ".join(rng.choice(words, size=max(1, length)))

    lines = []
    for number in range(count):
        np.save(source / f"{number}.npy", rng.normal(size=PIECE[::-1]).astype(np.float32))
        media = {"media": f"{number}.npy", "modality": "imu", "rate": PIECE[1]}
        lines.append({"key": f"{number:06d}", **SAMPLES[job](rng, media, text)})
    manifest = source / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_shards(str(manifest), str(folder / "shards"))
    make_index(str(folder / "shards"), IndexOptions(str(folder / "tokenizer")))
