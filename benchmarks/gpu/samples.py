"""Generated data: images of the usual size of photographs, and texts of realistic lengths with random words.

Lengths in tokens, uniform: captions 20 to 200, one in twenty 300 to 1200; instructions 10 to 60 with answers of 20 to
200, one in four with two turns; preference pairs 10 to 60 with two answers of 30 to 250.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from anymal_side import write_tokenizer
from PIL import Image
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
        lines.append({"key": f"{number:06d}", **_SAMPLES[case.job](rng, media, text)})
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


Text = Callable[[int, int], str]


def _caption(rng: np.random.Generator, media: dict[str, Any], text: Text) -> dict[str, Any]:
    return {"parts": [media, {"text": text(300, 1200) if rng.random() < 0.05 else text(20, 200)}]}


def _question(media: dict[str, Any], text: Text) -> dict[str, Any]:
    return {"role": "user", "content": [{"text": text(10, 60)}, media]}


def _conversation(rng: np.random.Generator, media: dict[str, Any], text: Text) -> dict[str, Any]:
    messages = [_question(media, text), {"role": "assistant", "content": text(20, 200)}]
    if rng.random() < 0.25:
        messages.append({"role": "user", "content": text(10, 60)})
        messages.append({"role": "assistant", "content": text(20, 200)})
    return {"messages": messages}


def _pair(rng: np.random.Generator, media: dict[str, Any], text: Text) -> dict[str, Any]:
    # Distinct last words keep the two answers different, however short they are in a dry run.
    return {
        "messages": [_question(media, text)],
        "chosen": f"{text(30, 250)} w1",
        "rejected": f"{text(30, 250)} w2",
    }


_SAMPLES = {"pretrain": _caption, "sft": _conversation, "dpo": _pair}
