"""Generated data: images of the usual size of photographs, and texts of realistic lengths with random words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from anymal_side import write_tokenizer
from PIL import Image
from sample_texts import SAMPLES
from shapes import SPECIAL, Case

from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import write_shards
from megatron_anymal.data.shard_index import ShardIndex

# Number of different images, shared by the samples.
PICTURES = 64
# Number of words that texts are drawn from; the Llama's own vocabulary is larger.
WORDS = 4096


def write_data(folder: Path, case: Case, count: int) -> float:
    """Write a tokenizer and shards with `count` samples for the case's job.

    Returns:
        Mean LLM tokens per sample, counting both answers of a preference pair.
    """
    rng = np.random.default_rng(0)
    vocabulary = min(WORDS, case.llama_shape["vocab_size"])
    words = write_tokenizer(folder / "tokenizer", SPECIAL, vocabulary)
    source = folder / "source"
    source.mkdir()
    for number in range(PICTURES):
        _picture(rng, case).save(source / f"{number}.jpg", quality=90)

    def text(shortest: int, longest: int) -> str:
        length = int(rng.integers(shortest, longest + 1)) // (16 if case.dry_run else 1)
        return " ".join(rng.choice(words, size=max(1, length)))

    lines = []
    for number in range(count):
        media = {"media": f"{number % PICTURES}.jpg", "modality": "image"}
        lines.append({"key": f"{number:06d}", **SAMPLES[case.job](rng, media, text)})
    manifest = source / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_shards(str(manifest), str(folder / case.job))
    make_index(str(folder / case.job), IndexOptions(str(folder / "tokenizer")))
    index = ShardIndex(str(folder / case.job))
    text_tokens, _ = index.lengths(np.arange(len(index)))
    documents = 2 if case.job == "dpo" else 1
    return documents * case.soft_tokens + float(text_tokens.sum()) / count


def _picture(rng: np.random.Generator, case: Case) -> Image.Image:
    """Soft shapes with some grain: pure noise would take longer to decode than a photograph."""
    size = (32, 24) if case.dry_run else (640, 480)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-12, 13, smooth.shape, dtype=np.int16)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
