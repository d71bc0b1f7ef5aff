"""Global sample order: the sample at each position of a run, computed from the position alone.

The order is a pure function that needs no list in memory:

- `permute` shuffles [0, n) with a Feistel network and cycle walking, which gives random access to any element of the
  shuffled order;
- `GlobalOrder` interleaves datasets in blocks. In each block, every dataset gets its share of the positions (rounded so
  that the shares stay exact over the run) and the positions are shuffled, so the mix holds over any part of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def mix64(*numbers: int) -> int:
    """64-bit hash of integers (chained SplitMix64 finaliser)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK64)) & _MASK64
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def scramble(values: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """64-bit hashes of numbers (SplitMix64 finaliser); a permutation of all numbers for each key.

    Args:
        values: [n] uint64.
        key: one for all numbers, or [n] uint64.

    Returns:
        [n] uint64.
    """
    values = values + np.asarray(key, np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """The elements at positions `places` of the pseudorandom permutation of [0, n) selected by `key`.

    Args:
        places: [k] integers in [0, n).
        n: size of the range.
        key: any integer; each key selects a different permutation.

    Returns:
        [k] int64.
    """
    half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = [mix64(key, i) for i in range(_ROUNDS)]
    values = np.asarray(places).astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    with np.errstate(over="ignore"):
        while outside.any():
            left, right = values[outside] >> half, values[outside] & mask
            for round_key in keys:
                left, right = right, left ^ (scramble(right, round_key) & mask)
            values[outside] = (left << half) | right
            outside = values >= n
    return values.astype(np.int64)


@dataclass(frozen=True)
class GlobalOrder:
    """An infinite order over weighted datasets; each dataset is reshuffled in each of its epochs."""

    # Number of samples of each dataset.
    sizes: tuple[int, ...]
    # Share of each dataset in the order, relative to the sum.
    weights: tuple[float, ...]
    # Seed of all permutations.
    seed: int

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.weights) and min(self.sizes) > 0 and min(self.weights) > 0

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples at positions [start, stop).

        Returns:
            Dataset [stop - start] and sample within the dataset [stop - start], both int64.
        """
        block = self._block_size()
        first, last = start // block, -(-stop // block)
        wanted = slice(start - first * block, stop - first * block)
        dataset, sample = _blocks(self, first, last, block)
        return dataset[wanted].copy(), sample[wanted].copy()

    def _block_size(self) -> int:
        smallest = min(self.weights) / sum(self.weights)
        # At least two positions for the rarest dataset, so that no rounded share is ever negative.
        return max(256, int(2 / smallest) + 1)

    def in_blocks(self, first: int, last: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and sample at every position of the blocks [first, last): [(last - first) * block] int64 each."""
        # [last - first + 1, datasets]: how often each dataset occurs before each block.
        drawn = np.diff([self._bounds(k * block) for k in range(first, last + 1)], axis=1)
        shares = np.diff(drawn, axis=0)
        dataset = np.zeros(len(shares) * block, np.int64)
        # The positions of a single dataset need no shuffling.
        for k in range(len(shares) if len(self.sizes) > 1 else 0):
            slots = permute(np.arange(block), block, mix64(self.seed, 1, first + k))
            dataset[k * block : (k + 1) * block] = np.searchsorted(np.cumsum(shares[k]), slots, side="right")
        sample = np.empty_like(dataset)
        for d in range(len(self.sizes)):
            sample[dataset == d] = self._shuffled(d, np.arange(drawn[0, d], drawn[-1, d]))
        return dataset, sample

    def _bounds(self, places: int) -> list[int]:
        """Rounded cumulative shares of the datasets among the first `places` positions."""
        weights = [Fraction(w) for w in self.weights]
        total, running, bounds = sum(weights), Fraction(0), [0]
        for weight in weights:
            running += weight
            bounds.append(round(places * running / total))
        return bounds

    def _shuffled(self, dataset: int, turns: np.ndarray) -> np.ndarray:
        size = self.sizes[dataset]
        sample = np.empty_like(turns)
        for epoch in np.unique(turns // size):
            mine = turns // size == epoch
            sample[mine] = permute(turns[mine] % size, size, mix64(self.seed, 2, dataset, int(epoch)))
        return sample


@lru_cache(maxsize=8)
def _blocks(order: GlobalOrder, first: int, last: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Cached blocks; steps that are shorter than a block share it."""
    return order.in_blocks(first, last, block)
