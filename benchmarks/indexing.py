"""Measure how fast shards are indexed, relative to just reading them.

    python benchmarks/indexing.py

Two floors alternate with `anymal prepare --index-only` (one process, startup excluded): Python's `tarfile` reading all
members, and webdataset's reader grouping members into samples. Both silently lose samples of damaged shards
(benchmarks/damaged_shards.py); the index accounts for every byte, probes the media and counts the text's tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_anymal.cli.prepare import main as prepare


def jpeg(seed: int, side: int = 64) -> bytes:
    """A small random JPEG image."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_shards(folder: Path, shards: int, samples: int) -> None:
    """Write shards like img2dataset's: an image, its caption, and metadata per sample."""
    folder.mkdir(parents=True)
    pictures = [jpeg(seed) for seed in range(64)]
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(samples):
                key = f"{shard:05d}{number:04d}"
                meta = json.dumps({"url": f"http://example.com/{key}", "width": 64, "height": 64, "status": "success"})
                members = {"jpg": pictures[number % 64], "txt": b"a cat on a sofa", "json": meta.encode()}
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_tokenizer(folder: Path) -> None:
    """Write a word-level tokenizer."""
    words = ["<|begin_of_text|>", "<|end_of_text|>", "<unk>", "a", "cat", "on", "sofa"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=words[0], eos_token=words[1]).save_pretrained(folder)


def with_tarfile(folder: Path) -> int:
    """Read every member and compute its checksum; return the number of members."""
    count = 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                zlib.crc32(file.read())
                count += 1
    return count


def with_webdataset(folder: Path) -> int:
    """Read every sample; return the number of samples."""
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    return sum(1 for _ in webdataset.WebDataset(paths, shardshuffle=False))


def with_anymal(folder: Path, tokenizer: Path) -> int:
    """Index the folder; return the number of samples."""
    options = ["--index-only", str(folder), "--tokenizer", str(tokenizer), "--workers", "1"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert prepare(options) == 0
    return int(json.loads((folder / "index" / "index.json").read_text())["samples"])


def seconds_of(call: Callable[[], int], expected: int) -> float:
    """CPU seconds of a call that must return `expected`."""
    begun = time.process_time()
    assert call() == expected
    return time.process_time() - begun


def main(argv: Sequence[str] | None = None) -> None:
    """Time all three alternately and print microseconds per sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1000, help="per shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="JSON file for the raw numbers")
    arguments = parser.parse_args(argv)
    count = arguments.shards * arguments.samples
    with tempfile.TemporaryDirectory() as temporary:
        folder, tokenizer = Path(temporary) / "shards", Path(temporary) / "tokenizer"
        write_shards(folder, arguments.shards, arguments.samples)
        write_tokenizer(tokenizer)
        sides: dict[str, tuple[Callable[[], int], int]] = {
            "tarfile": (lambda: with_tarfile(folder), 3 * count),
            "webdataset": (lambda: with_webdataset(folder), count),
            "anymal": (lambda: with_anymal(folder, tokenizer), count),
        }
        with_anymal(folder, tokenizer)
        rounds = {name: [] for name in sides}  # type: dict[str, list[float]]
        for _ in range(arguments.rounds):
            for name, (call, expected) in sides.items():
                rounds[name].append(seconds_of(call, expected) / count * 1e6)
    for name, turns in rounds.items():
        middle = statistics.median(turns)
        ratio = middle / statistics.median(rounds["tarfile"])
        spread = f"{min(turns):.1f} to {max(turns):.1f}"
        print(f"{name:<12} {middle:8.1f} us per sample ({spread}), {ratio:.2f} x tarfile")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({"samples": count, "microseconds_per_sample": rounds}, indent=1))


if __name__ == "__main__":
    main()
