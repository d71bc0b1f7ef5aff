"""Measure how full packs are and how long packing takes.

    python benchmarks/packing.py

The mix is long-tailed, like image, video and audio captions with some long documents: most samples have one encoder
input of 64 soft tokens and a short caption, one in ten has several inputs, one in fifty has up to thousands of text
tokens.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import numpy as np

from megatron_anymal.data.packing import pack

CAPACITY = 8192


@dataclass(frozen=True)
class Measured:
    """Statistics of one packed batch."""

    samples: int
    multiple: int
    packs: int
    # Lower bound: ceil(tokens / capacity).
    fewest: int
    # Share of real tokens among those computed: all packs are padded to the longest one.
    share: float
    # Share of real tokens in the packs' capacity.
    share_of_capacity: float
    seconds: float


def long_tailed_mix(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw lengths in LLM tokens and encoder costs (in encoder inputs) of `count` samples."""
    rng = np.random.default_rng(seed)
    pieces = np.ones(count, np.int64)
    several = rng.uniform(size=count) < 0.1
    pieces[several] = rng.integers(2, 18, size=int(several.sum()))
    text = np.clip(rng.lognormal(3.0, 0.8, count), 4, 400).astype(np.int64)
    long = rng.uniform(size=count) < 0.02
    text[long] = np.clip(rng.lognormal(7.5, 0.7, int(long.sum())), 500, 7000).astype(np.int64)
    pieces[long] = rng.integers(0, 3, size=int(long.sum()))
    return np.minimum(2 + 64 * pieces + text, CAPACITY), pieces.astype(np.float64)


def measure(lengths: np.ndarray, costs: np.ndarray, multiple: int) -> Measured:
    """Pack a batch once and measure it."""
    begun = time.perf_counter()
    packs = pack(lengths, costs, CAPACITY, multiple)
    seconds = time.perf_counter() - begun
    tokens = int(lengths.sum())
    longest = max(int(lengths[p].sum()) for p in packs)
    return Measured(
        samples=len(lengths),
        multiple=multiple,
        packs=len(packs),
        fewest=-(-tokens // CAPACITY),
        share=tokens / (longest * len(packs)),
        share_of_capacity=tokens / (CAPACITY * len(packs)),
        seconds=seconds,
    )


def main() -> None:
    """Measure all mixes and print one JSON line per mix."""
    for count, multiple in ((1024, 1), (1024, 4), (26_880, 1), (26_880, 64)):
        print(json.dumps(asdict(measure(*long_tailed_mix(count), multiple))))


if __name__ == "__main__":
    main()
