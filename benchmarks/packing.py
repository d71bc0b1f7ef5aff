"""Measure how full and how even packs are, and how long planning a step takes, against what is possible.

    python benchmarks/packing.py --out results.json
    python benchmarks/packing.py --index 1000000 10000000 100000000 --out results.json

The mix is long-tailed, like image, video and audio captions with some long documents: most samples have one encoder
input of 64 soft tokens and a short caption, one in ten has several inputs, one in fifty has up to thousands of text
tokens. Planning reads an index of synthetic samples (`plan_index.py`; 13 GB for a hundred million). All times are
processor time, user and system, on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from megatron_anymal.data.configured_modality import integer_costs
from megatron_anymal.data.packing import pack

CAPACITY = 8192
REPLICAS = 8
# (samples, divisor of the number of packs, divisor of their padded length).
CASES = ((1024, 1, 1), (1024, 8, 64), (26_880, 1, 1), (26_880, 64, 64))
# Samples and replicas of batches of images, videos and audio.
MIXED = ((1024, 8), (1024, 24), (26_880, 256))
# Least share of real tokens; largest encoder cost of a replica relative to the mean, seconds per step, memory in bytes.
BARS = {"share": 0.99, "cost_over_replicas": 1.05, "seconds": 0.1, "memory": 10**9}
# Encoder inputs of published models: elements, floating-point operations (Encoder.flops_per_piece), soft tokens.
ENCODERS = {
    "OpenCLIP ViT-bigG/14": (150_528, 967.5e9, 64),
    "VideoMAE ViT-L": (2_408_448, 1193.7e9, 32),
    "CLAP HTSAT": (256_256, 11.8e9, 32),
}


@dataclass(frozen=True)
class PackingStatistics:
    """Statistics of one packed batch."""

    samples: int
    multiple: int
    length_multiple: int
    packs: int
    # Lower bound: ceil(tokens / capacity).
    fewest: int
    # Share of real tokens among those computed: all packs are padded to the longest one.
    share: float
    # Upper bound at this number of packs: neither the mean nor the longest document can be exceeded.
    highest_share: float
    # Highest encoder cost of a replica, and of a pack, relative to the mean.
    cost_over_replicas: float
    cost_over_packs: float
    seconds: float


def long_tailed_mix(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw lengths in LLM tokens and encoder costs (in encoder inputs) of `count` samples, [count] int64 each."""
    rng = np.random.default_rng(seed)
    pieces = np.ones(count, np.int64)
    several = rng.uniform(size=count) < 0.1
    pieces[several] = rng.integers(2, 18, size=int(several.sum()))
    text = np.clip(rng.lognormal(3.0, 0.8, count), 4, 400).astype(np.int64)
    long = rng.uniform(size=count) < 0.02
    text[long] = np.clip(rng.lognormal(7.5, 0.7, int(long.sum())), 500, 7000).astype(np.int64)
    pieces[long] = rng.integers(0, 3, size=int(long.sum()))
    return np.minimum(2 + 64 * pieces + text, CAPACITY), pieces


def measure(
    lengths: np.ndarray, costs: np.ndarray, multiple: int, replicas: int = 1, length_multiple: int = 1
) -> PackingStatistics:
    """Pack a batch once and measure it."""
    begun = time.process_time()
    packs = pack(lengths, costs, CAPACITY, multiple, replicas=replicas, length_multiple=length_multiple)
    seconds = time.process_time() - begun
    tokens, mean = int(lengths.sum()), -(-int(lengths.sum()) // len(packs))
    longest, least = (
        -(-length // length_multiple) * length_multiple
        for length in (max(int(lengths[p].sum()) for p in packs), max(mean, int(lengths.max())))
    )
    return PackingStatistics(
        samples=len(lengths),
        multiple=multiple,
        length_multiple=length_multiple,
        packs=len(packs),
        fewest=-(-tokens // CAPACITY),
        share=tokens / (longest * len(packs)),
        highest_share=tokens / (least * len(packs)),
        cost_over_replicas=unevenness(packs, costs, replicas),
        cost_over_packs=unevenness(packs, costs, len(packs)),
        seconds=seconds,
    )


def unevenness(packs: Sequence[Sequence[int]], costs: np.ndarray, replicas: int) -> float:
    """Highest cost of a replica relative to the mean; pack k belongs to replica k modulo `replicas`."""
    work = np.array([costs[p].sum() for p in packs]).reshape(-1, replicas).sum(axis=0)
    return float(work.max() / work.mean())


def balanced_by(samples: int, replicas: int) -> dict[str, float]:
    """Highest operations of a replica relative to the mean, if packs are balanced by input size or by operations."""
    rng = np.random.default_rng(0)
    kind, pieces = rng.choice(3, samples, p=(0.6, 0.15, 0.25)), rng.integers(1, 5, samples)
    elements, operations, soft_tokens = (np.array(column) for column in zip(*ENCODERS.values()))
    lengths = 2 + pieces * soft_tokens[kind] + np.clip(rng.lognormal(3.0, 0.8, samples), 4, 400).astype(np.int64)
    by_name = {}
    for name, per_piece in (("input size", elements), ("operations", operations)):
        costs = pieces * np.array(integer_costs(per_piece.tolist()))[kind]
        packs = pack(lengths, costs, CAPACITY, replicas, replicas=replicas, length_multiple=64)
        by_name[name] = unevenness(packs, pieces * operations[kind], replicas)
    return by_name


def planned(samples: int, folder: str) -> dict[str, Any]:
    """Result of `plan_index.py` for one size of the index."""
    command = [sys.executable, str(Path(__file__).with_name("plan_index.py")), str(samples)]
    if folder:
        command += ["--folder", f"{folder}/{samples}"]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def print_packs(rows: Sequence[PackingStatistics]) -> None:
    """Print one line per batch."""
    print(f"packs of at most {CAPACITY} tokens, {REPLICAS} replicas (one if the number of packs is free)")
    print("samples  multiple of      packs (fewest)  real tokens (highest)  cost of replicas, packs  seconds")
    for row in rows:
        print(
            f"{row.samples:7}  {row.multiple:3} x {row.length_multiple:2} tokens  {row.packs:5} ({row.fewest:5})   "
            f"{row.share:9.4f} ({row.highest_share:.4f})     {row.cost_over_replicas:9.4f}, {row.cost_over_packs:.3f}  "
            f"  {row.seconds:9.4f}"
        )
    print(f"bars: real tokens at least {BARS['share']}, cost of replicas at most {BARS['cost_over_replicas']}")


def print_plans(plans: Sequence[dict[str, Any]]) -> None:
    """Print one line per size of the index."""
    print("planning a step of 26,880 samples: median of ten, and the first time; peak resident memory")
    for plan in plans:
        seconds, memory = plan["seconds"], plan["memory"]["peak"]
        print(
            f"{plan['samples']:11,} samples  {statistics.median(seconds):.4f} s, "
            f"{statistics.median(plan['first_time']):.4f} s  "
            f"{memory / 1e6:.0f} MB"
        )
    print(f"bars: {BARS['seconds']} s, {BARS['memory'] / 1e6:.0f} MB")


def main() -> None:
    """Measure everything, print it, and write it to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--index",
        type=int,
        nargs="*",
        default=[1_000_000],
        help="sizes of the indexes to plan from, in samples (default: %(default)s)",
    )
    parser.add_argument("--folder", default="", help="folder that keeps the indexes (default: a temporary one)")
    parser.add_argument("--out", help="JSON file for the results")
    arguments = parser.parse_args()
    rows = [
        measure(*long_tailed_mix(count), multiple, REPLICAS if multiple > 1 else 1, length_multiple)
        for count, multiple, length_multiple in CASES
    ]
    print_packs(rows)
    by = {f"{samples} on {replicas}": balanced_by(samples, replicas) for samples, replicas in MIXED}
    print("samples on replicas: operations of replicas, highest relative to the mean, for images, videos and audio")
    for sizes, unevenness_by in by.items():
        print(f"{sizes:>12}: {', '.join(f'{value:.3f} balanced by {name}' for name, value in unevenness_by.items())}")
    plans = [planned(samples, arguments.folder) for samples in arguments.index]
    print_plans(plans)
    results = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, load average {os.getloadavg()[0]:.0f}",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": " ".join(["python benchmarks/packing.py --index", *map(str, arguments.index)]),
        "bars": BARS,
        "packs": [asdict(row) for row in rows],
        "balanced_by": by,
        "plans": plans,
    }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
