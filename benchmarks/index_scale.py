"""Seconds and memory to open a large index, construct a planner and plan steps of 26,880 samples, against bare reads.

    python benchmarks/index_scale.py --samples 100000000 --folder /scratch --out results.json

The index is synthetic: each sample has an image and a caption. It takes about 110 bytes of disk per sample and is
removed at the end. A separate process measures it. `bare reads` reads the rows of the same samples from memory-mapped
files, without any planning. `without bounds` is a planner for an index of an earlier version, which reads every row to
find samples that are too long. All reads come from the page cache if the machine's memory holds the files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_anymal.config import DatasetConfig, EncoderConfig, ModalityConfig
from megatron_anymal.data.index_format import MEDIA, SAMPLE, IndexHeader
from megatron_anymal.data.index_writer import TableRows, write_index
from megatron_anymal.data.planner import BatchLayout, BatchPlanner, PlannedModality
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.modalities import build_modality

# Samples per shard, and the distance between two samples in bytes.
SHARD, APART = 10_000, 10_240
GLOBAL_BATCH, SEQ_LENGTH = 26_880, 4096


class NoTokenizer:
    """Stands in for the tokenizer of the index, of which planning only compares the fingerprint."""

    def fingerprint(self) -> str:
        """The fingerprint in the index header."""
        return "made up"


def tables(samples: int) -> Iterator[TableRows]:
    """The rows of each shard: captions of a long-tailed length, and images of the usual sizes."""
    for shard, start in enumerate(range(0, samples, SHARD)):
        rng = np.random.default_rng(shard)
        count = min(SHARD, samples - start)
        rows, media = np.zeros(count, SAMPLE), np.zeros(count, MEDIA)
        number = np.arange(count)
        rows["shard"], rows["text_offset"], rows["text_length"] = shard, number * APART + 8192, 80
        rows["tokens"] = np.minimum(3 + rng.geometric(0.05, count), 1000)
        rows["targets"] = rows["tokens"] - 1
        rows["media_start"], rows["media_count"] = start + number, 1
        rows["key_offset"], rows["key_length"] = (start + number) * 9, 9
        media["offset"], media["length"] = number * APART + 512, 7000
        media["size"] = rng.integers(100, 1200, (count, 2))
        keys = np.char.zfill((start + number).astype("S9"), 9).tobytes()
        yield TableRows(rows, media, keys, {})


def write(folder: Path, samples: int) -> None:
    """Write the index, and empty shards of the right sizes, which take no room."""
    names = [f"{shard:06d}.tar" for shard in range(-(-samples // SHARD))]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(SHARD * APART)
    header = IndexHeader(tuple(names), (SHARD * APART,) * len(names), ("image",), ("jpg",), "made up")
    write_index(str(folder), header, samples, samples, tables(samples))


def images() -> PlannedModality:
    """Images of at most 17 tiles, with 64 soft tokens each."""
    encoder = EncoderConfig(type="clip", config={"image_size": 224, "patch_size": 14})
    return PlannedModality("image", "image", build_modality("image", ModalityConfig(encoder=encoder)), 64)


def planner(folder: str, modality: PlannedModality) -> BatchPlanner:
    """A planner of alignment that refuses samples that are too long."""
    tokenizer: Any = NoTokenizer()
    return BatchPlanner(
        {"images": DatasetConfig(path=folder)},
        [modality],
        tokenizer,
        BatchLayout(data_parallel_size=64, micro_batch_size=1, seq_length=SEQ_LENGTH),
        global_batch_size=GLOBAL_BATCH,
        seed=1,
    )


def bare_reads(folder: Path, sample: np.ndarray) -> None:
    """Read the rows of samples and of their images."""
    rows = np.load(folder / "index" / "samples.npy", mmap_mode="r")[sample]
    media = np.load(folder / "index" / "media.npy", mmap_mode="r")[rows["media_start"]]
    assert len(media) == len(sample)


def memory() -> dict[str, int]:
    """Resident memory of this process in bytes: its own, and pages of mapped files, which the system may reclaim."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def seconds_of(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall-clock and processor seconds of a call, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Measure an index in this process."""
    modality, before = images(), memory()
    opened, index = seconds_of(lambda: ShardIndex(str(folder)))
    constructed, plans = seconds_of(lambda: planner(str(folder), modality))
    after = memory()
    last = len(index) // GLOBAL_BATCH
    turns: dict[str, list[dict[str, float]]] = {"plan": [], "bare reads": []}
    for step in np.random.default_rng(0).integers(0, max(1, last), steps).tolist():
        took, plan = seconds_of(lambda: plans.plan(step))  # noqa: B023
        turns["plan"].append(took)
        turns["bare reads"].append(seconds_of(lambda: bare_reads(folder, plan.sample))[0])  # noqa: B023
    seconds = {"open": opened, "planner": constructed, **turns}
    path = folder / "index" / "index.json"
    body = json.loads(path.read_text())
    del body["counts"]
    path.write_text(json.dumps(body))
    planned = memory()
    seconds["without bounds"] = seconds_of(lambda: planner(str(folder), modality))[0]
    grown = {name: {"planner": after[name] - before[name], "plans": planned[name] - before[name]} for name in before}
    return {"seconds": seconds, "memory": grown}


def report(samples: int, results: dict[str, Any]) -> None:
    """Print the results."""
    seconds = results["seconds"]
    print(f"{samples:,} samples, {results['index_bytes'] / 1e9:.1f} GB")
    for name in ("open", "planner", "without bounds"):
        print(f"{name:<16} {seconds[name]['wall']:8.3f} s (processor time {seconds[name]['cpu']:.3f} s)")
    for name in ("plan", "bare reads"):
        walls, cpus = ([turn[kind] for turn in seconds[name]] for kind in ("wall", "cpu"))
        print(f"{name:<16} {statistics.median(walls):8.3f} s ({statistics.median(cpus):.3f} s), first {walls[0]:.3f} s")
    for name, grown in results["memory"].items():
        what = {"RssAnon": "own memory", "RssFile": "mapped pages"}[name]
        print(f"{what:<16} {grown['planner'] / 1e6:8.1f} MB with a planner, {grown['plans'] / 1e6:.1f} MB after plans")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and with `--out` write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000, help="samples in the index (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="random steps to plan (default: %(default)s)")
    parser.add_argument("--folder", help="folder for the index (default: the folder of temporary files)")
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments.steps)))
        return
    from measuring import surroundings

    around = surroundings()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        written, _ = seconds_of(lambda: write(folder, arguments.samples))
        words = [sys.executable, __file__, "--measure", temporary, "--steps", str(arguments.steps)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        size = sum(path.stat().st_size for path in (folder / "index").iterdir())
    results = {"samples": arguments.samples, "index_bytes": size, "write": written, **json.loads(done.stdout)}
    report(arguments.samples, results)
    if arguments.out:
        size_options = f"--samples {arguments.samples} --steps {arguments.steps}"
        command = f"python benchmarks/index_scale.py {size_options} --out results.json"
        Path(arguments.out).write_text(json.dumps({"command": command, **around, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
