"""Processor time and memory of planning steps from an index of synthetic samples, one process per size.

    python benchmarks/plan_index.py 1000000 --folder FOLDER

Writes the index unless the folder already holds it (130 bytes per sample), plans steps of 26,880 samples as in training
on 64 replicas, and prints one JSON object: processor seconds (user and system) of each step, when its rows are read for
the first time, perhaps from the disk, and when they are in the operating system's cache; and the highest resident
memory of the process in bytes, memory-mapped pages of the index included. Rows are generated for the first million
samples and then repeated. `packing.py` compares sizes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_anymal.config import DatasetConfig
from megatron_anymal.data.configured_modality import PlannedModality
from megatron_anymal.data.index_format import MEDIA, SAMPLE, IndexHeader
from megatron_anymal.data.index_writer import TableRows, write_index
from megatron_anymal.data.planner import BatchLayout, BatchPlanner

# Samples per step, and steps that are planned.
BATCH, STEPS = 26_880, 10
_REPEATED = 1_000_000


class OnePiece:
    """A modality in which every item has one piece."""

    piece_shape = (3, 224, 224)

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """One piece for each of [n, 2] sizes."""
        return np.ones(len(sizes), np.int64)


class AnyTokenizer:
    """A tokenizer with the fingerprint of the synthetic indexes."""

    def fingerprint(self) -> str:
        """The fingerprint."""
        return "made up"


def long_tailed_rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """[count] SAMPLE and [m] MEDIA rows with the lengths of `packing.long_tailed_mix`."""
    rng = np.random.default_rng(0)
    items = np.ones(count, np.int64)
    several = rng.uniform(size=count) < 0.1
    items[several] = rng.integers(2, 18, size=int(several.sum()))
    text = np.clip(rng.lognormal(3.0, 0.8, count), 4, 400).astype(np.int64)
    long = rng.uniform(size=count) < 0.02
    text[long] = np.clip(rng.lognormal(7.5, 0.7, int(long.sum())), 500, 7000).astype(np.int64)
    items[long] = rng.integers(0, 3, size=int(long.sum()))
    samples = np.zeros(count, SAMPLE)
    samples["tokens"], samples["targets"] = text + 2, text
    samples["media_count"], samples["media_start"] = items, np.cumsum(items) - items
    media = np.zeros(int(items.sum()), MEDIA)
    media["size"] = rng.uniform(200, 900, (len(media), 2))
    return samples, media


def write(folder: Path, count: int) -> None:
    """Write an index without shards."""
    samples, media = long_tailed_rows(min(count, _REPEATED))
    times = -(-count // len(samples))
    header = IndexHeader((), (), ("image",), ("jpg",), "made up")
    tables = (TableRows(_moved(samples, turn * len(media)), media, b"", {}) for turn in range(times))
    write_index(str(folder), header, times * len(samples), times * len(media), tables)


def _moved(samples: np.ndarray, items: int) -> np.ndarray:
    """The samples, with their media items shifted by `items`."""
    moved = samples.copy()
    moved["media_start"] += items
    return moved


def planner(folder: Path) -> BatchPlanner:
    """The planner of a run on 64 replicas with packs of 8,192 tokens."""
    modality: Any = OnePiece()
    tokenizer: Any = AnyTokenizer()
    return BatchPlanner(
        {"made up": DatasetConfig(path=str(folder))},
        [PlannedModality("image", "image", modality, 64)],
        tokenizer,
        BatchLayout(data_parallel_size=64, micro_batch_size=1, seq_length=8192, length_multiple=64),
        global_batch_size=BATCH,
        seed=0,
        too_long="drop",
        check_shards=False,
    )


def peak_memory() -> dict[str, int]:
    """Highest resident memory of this process, and its private memory now, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(lines[key].split()[0]) for name, key in (("peak", "VmHWM"), ("private", "RssAnon"))}


def measure(folder: Path) -> dict[str, Any]:
    """Plan steps and measure them."""
    begun = time.process_time()
    plans = planner(folder)
    opened = time.process_time() - begun
    first, seconds, shares = [], [], []
    for number in range(2 * STEPS):
        begun = time.process_time()
        plan = plans.plan(number % STEPS)
        (first if number < STEPS else seconds).append(time.process_time() - begun)
        shares.append(plan.tokens / (plan.padded_length * sum(map(len, plan.micro_batches))))
    begun = time.process_time()
    plan.of_replica(0)
    return {
        "samples": len(plans.indexes[0]),
        "opening": opened,
        "first_time": first,
        "seconds": seconds,
        "of_replica": time.process_time() - begun,
        "shares": shares[:STEPS],
        "memory": peak_memory(),
    }


def main() -> None:
    """Measure one size and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=int, help="number of samples in the index")
    parser.add_argument("--folder", help="folder that keeps the index (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        if not (folder / "index" / "index.json").exists():
            write(folder, arguments.samples)
        print(json.dumps(measure(folder)))


if __name__ == "__main__":
    main()
