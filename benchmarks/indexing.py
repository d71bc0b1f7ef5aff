"""Measure how fast shards are indexed: against only reading them, with one process and with two, and the cost of rows.

    python benchmarks/indexing.py --out results.json

1. Two floors alternate with `anymal prepare --index-only` (one process, startup excluded): Python's `tarfile` reading
   all members, and webdataset's reader grouping members into samples. Both silently lose samples of damaged shards
   (benchmarks/damaged_shards.py); the index accounts for every byte, probes the media and counts the text's tokens.
2. Wall-clock time of the whole command, with `--workers 1` and `--workers 2` in turn on a larger folder; and on a
   folder of one sample, which shows how much of it is the start and exit of Python and the import of transformers.
3. Rows of synthetic samples, in two sizes (index_memory.py): time to fill them, and growth of the peak memory.
4. With `--energon PATH`, the command `energon` of an environment with megatron-energon: processor time of the whole
   commands `anymal prepare --index-only` and `energon prepare` on the larger folder, and on a folder of one sample,
   which measures their startup. `energon prepare` reads the headers of the tar files; with
   `--media-metadata-by-extension` it also probes the media, as the index does. It counts no tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from measuring import surroundings
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_anymal.cli.prepare import main as prepare
from megatron_anymal.data.index_processes import useful_workers
from megatron_anymal.data.shard_listing import find_shards


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
                key = f"{shard:05d}{number:05d}"
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


def arguments_of(folder: Path, tokenizer: Path, workers: int) -> list[str]:
    """Arguments of `anymal prepare`."""
    return ["--index-only", str(folder), "--tokenizer", str(tokenizer), "--workers", str(workers)]


def indexed(folder: Path) -> int:
    """Number of samples in a folder's index, which is removed."""
    samples = json.loads((folder / "index" / "index.json").read_text())["samples"]
    (folder / "index" / "index.json").unlink()
    return int(samples)


def with_anymal(folder: Path, tokenizer: Path) -> int:
    """Index the folder; return the number of samples."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert prepare(arguments_of(folder, tokenizer, 1)) == 0
    return indexed(folder)


def seconds_of(call: Callable[[], int], expected: int) -> float:
    """CPU seconds of a call that must return `expected`."""
    begun = time.process_time()
    assert call() == expected
    return time.process_time() - begun


def against_floors(folder: Path, tokenizer: Path, count: int, rounds: int) -> dict[str, list[float]]:
    """CPU microseconds per sample of both floors and of indexing, per round."""
    sides: dict[str, tuple[Callable[[], int], int]] = {
        "tarfile": (lambda: with_tarfile(folder), 3 * count),
        "webdataset": (lambda: with_webdataset(folder), count),
        "anymal": (lambda: with_anymal(folder, tokenizer), count),
    }
    with_anymal(folder, tokenizer)
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (call, expected) in sides.items():
            turns[name].append(seconds_of(call, expected) / count * 1e6)
    for name, values in turns.items():
        ratio = statistics.median(values) / statistics.median(turns["tarfile"])
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{name:<12} {statistics.median(values):8.1f} us per sample ({spread}), {ratio:.2f} x tarfile")
    return turns


def command_seconds(folder: Path, tokenizer: Path, workers: int, count: int) -> float:
    """Wall-clock seconds of the whole command."""
    command = [sys.executable, "-m", "megatron_anymal", "prepare", *arguments_of(folder, tokenizer, workers)]
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - begun
    assert indexed(folder) == count
    return seconds


def by_workers(folder: Path, one_sample: Path, tokenizer: Path, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of the whole command with one process and with two, and on a folder of one sample, in turn."""
    processes = useful_workers(2, (file.size for file in find_shards(str(folder)).values()))
    turns: dict[str, list[float]] = {"start": [], "1": [], "2": []}
    for _ in range(rounds):
        turns["start"].append(command_seconds(one_sample, tokenizer, 1, 1))
        for workers in ("1", "2"):
            turns[workers].append(command_seconds(folder, tokenizer, int(workers), count))
    for workers in ("1", "2"):
        rates = ", ".join(f"{count / seconds:,.0f}" for seconds in turns[workers])
        print(f"--workers {workers}: {rates} samples/s ({', '.join(f'{seconds:.1f}' for seconds in turns[workers])} s)")
    start = statistics.median(turns["start"])
    ratios = {
        "whole": [one / two for one, two in zip(turns["1"], turns["2"])],
        "after_start": [(one - start) / (two - start) for one, two in zip(turns["1"], turns["2"])],
    }
    for name, values in ratios.items():
        print(f"ratio, {name}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    print(f"{start:.1f} s for one sample; --workers 2 uses {processes} process{'es' if processes > 1 else ''}")
    return {"samples": count, "processes": processes, "seconds": turns, "ratios": ratios}


def cpu_seconds(command: Sequence[str]) -> float:
    """Processor time of a command and its children, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def against_energon(
    energon: str, folder: Path, one_sample: Path, tokenizer: Path, count: int, rounds: int
) -> dict[str, Any]:
    """Processor seconds of both commands in turn, on a folder and on one sample."""
    options = ["--non-interactive", "--split-ratio=1,0,0", "--skip-dataset-yaml", "--num-workers=1", "--no-progress"]
    anymal = [sys.executable, "-m", "megatron_anymal", "prepare", "--rebuild"]
    turns: dict[str, list[float]] = {}
    for _ in range(rounds):
        for where, path in (("", folder), (", one sample", one_sample)):
            sides = {
                "anymal prepare": [*anymal, *arguments_of(path, tokenizer, 1)],
                "energon prepare": [energon, "prepare", *options, str(path)],
                "energon prepare, media": [energon, "prepare", *options, "--media-metadata-by-extension", str(path)],
            }
            for name, command in sides.items():
                shutil.rmtree(path / ".nv-meta", ignore_errors=True)
                turns.setdefault(name + where, []).append(cpu_seconds(command))
    seconds = {name: statistics.median(values) for name, values in turns.items()}
    for name in ("anymal prepare", "energon prepare", "energon prepare, media"):
        start = seconds[f"{name}, one sample"]
        ratio = seconds[name] / seconds["anymal prepare"]
        each = (seconds[name] - start) / count * 1e6
        print(f"{name:<24} {seconds[name]:6.2f} s CPU time ({ratio:.2f} x), without startup {each:.0f} us per sample")
    code = "import importlib.metadata; print(importlib.metadata.version('megatron-energon'), end='')"
    python = str(Path(energon).with_name("python"))
    version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return {"samples": count, "version": version, "seconds": turns}


def rows_of(sizes: Sequence[int]) -> dict[str, Any]:
    """Filling time and peak memory per made-up sample; the memory is the growth between the two sizes."""
    script = Path(__file__).with_name("index_memory.py")
    runs = []
    for size in sizes:
        done = subprocess.run([sys.executable, str(script), str(size)], check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
    small, large = runs
    more = max(1, large["samples"] - small["samples"])
    per_sample = {name: (large[name] - small[name]) / more for name in ("peak_bytes", "index_bytes")}
    print(f"rows: {large['fill_microseconds']:.2f} us per sample to fill, {large['rest_microseconds']:.2f} us to write")
    print(f"per sample: index {per_sample['index_bytes']:.0f} bytes, peak memory {per_sample['peak_bytes']:.0f} bytes")
    return {"runs": runs, "per_sample": per_sample}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and with `--out` write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", type=int, default=4, help="shards of the folder compared with the floors (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=1000, help="samples of each of these shards (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of this comparison (default: %(default)s)")
    parser.add_argument(
        "--worker-shards", type=int, default=64, help="shards of the larger folder (default: %(default)s)"
    )
    parser.add_argument(
        "--worker-samples",
        type=int,
        default=4000,
        help="samples of each shard of the larger folder (default: %(default)s)",
    )
    parser.add_argument(
        "--worker-rounds", type=int, default=3, help="rounds on the larger folder (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, nargs=2, default=(100_000, 1_000_000), help="numbers of made-up samples")
    parser.add_argument("--energon", help="the command energon of an environment with megatron-energon")
    parser.add_argument("--out", help="JSON file for the results")
    arguments = parser.parse_args(argv)
    count = arguments.shards * arguments.samples
    with tempfile.TemporaryDirectory() as temporary:
        names = ("shards", "large", "one_sample", "tokenizer")
        folder, large, one_sample, tokenizer = (Path(temporary) / name for name in names)
        write_tokenizer(tokenizer)
        write_shards(folder, arguments.shards, arguments.samples)
        floors = against_floors(folder, tokenizer, count, arguments.rounds)
        write_shards(large, arguments.worker_shards, arguments.worker_samples)
        in_large = arguments.worker_shards * arguments.worker_samples
        write_shards(one_sample, 1, 1)
        workers = by_workers(large, one_sample, tokenizer, in_large, arguments.worker_rounds)
        peer = {}
        if arguments.energon:
            rounds = arguments.worker_rounds
            peer = against_energon(arguments.energon, large, one_sample, tokenizer, in_large, rounds)
    rows = rows_of(arguments.rows)
    if arguments.out:
        body = {
            # Without paths, which are those of this machine.
            "command": " ".join(
                ["python", *(word if "/" not in word or word == sys.argv[0] else "PATH" for word in sys.argv)]
            ),
            **surroundings(),
            "samples": count,
            "microseconds_per_sample": floors,
            "workers": workers,
            **({"energon": peer} if peer else {}),
            "rows": rows,
        }
        Path(arguments.out).write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
