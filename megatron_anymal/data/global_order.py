"""Global sample order: the sample at each position of a run, computed from the position alone.

The order is a pure function that needs no list in memory:

- `permute` shuffles [0, n) with a Feistel network and cycle walking, which gives random access to any element of the
  shuffled order;
- `GlobalOrder` interleaves datasets in blocks. In each block, every dataset gets its share of the positions (rounded so
  that the shares stay exact over the run) and the positions are shuffled, so the mix holds over any part of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np

_ROUNDS = 6
_MASK64 = (1 << 64) - 1
# The increment of SplitMix64.
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(*numbers: int) -> int:
    """64-bit hash of integers (chained SplitMix64 finaliser)."""
    state = _GOLDEN
    for number in numbers:
        state = (state ^ (number & _MASK64)) & _MASK64
        state = (state + _GOLDEN) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def _mix64_each(*numbers: int | np.ndarray) -> np.ndarray:
    """[k] uint64: `mix64` of numbers, each an integer or a [k] array of integers."""
    state = np.array([_GOLDEN], np.uint64)
    for number in numbers:
        values = number.astype(np.uint64) if isinstance(number, np.ndarray) else np.uint64(number & _MASK64)
        state = scramble(state ^ values, np.uint64(_GOLDEN))
    return state


def scramble(values: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    """64-bit hashes of numbers (SplitMix64 finaliser); a permutation of all numbers for each key.

    Args:
        values: [n] uint64.
        key: one for all numbers, or [n] uint64.

    Returns:
        [n] uint64.
    """
    with np.errstate(over="ignore"):
        values = values + key
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """The elements at `positions` of the pseudorandom permutation of [0, n) selected by `key`.

    Args:
        positions: [k] integers in [0, n).
        n: size of the range.
        key: any integer; each key selects a different permutation.

    Returns:
        [k] int64.
    """
    return _permute_each(np.asarray(positions), n, np.array([key & _MASK64], np.uint64))


def _permute_each(positions: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """`permute` of each position under a key of its own.

    Args:
        positions: [k] integers in [0, n).
        keys: [k] uint64, or [1] for all positions.

    Returns:
        [k] int64.
    """
    half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    values = positions.astype(np.uint64)
    rounds = [_mix64_each(keys, i) for i in range(_ROUNDS)]
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for round_keys in rounds:
            own = round_keys if len(round_keys) == 1 else round_keys[outside]
            left, right = right, left ^ (scramble(right, own) & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= np.uint64(n)]
    return values.astype(np.int64)


@dataclass(frozen=True)
class GlobalOrder:
    """An infinite order over weighted datasets; each dataset is reshuffled in each of its epochs."""

    # Number of samples of each dataset.
    sizes: tuple[int, ...]
    # Share of each dataset in the order, relative to the sum; 0 leaves it out.
    weights: tuple[float, ...]
    # Seed of all permutations.
    seed: int
    # Samples of each dataset that earlier stages of the run took; empty: none.
    taken: tuple[int, ...] = ()
    # Number of the stage of the run: each shuffles its blocks in its own way.
    stage: int = 0

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.weights) and min(self.sizes) > 0
        assert min(self.weights) >= 0 and max(self.weights) > 0

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

    def counts(self, count: int) -> np.ndarray:
        """[datasets] int64: how many of the first `count` positions are of each dataset."""
        whole = count - count % self._block_size()
        dataset, _ = self.samples(whole, count)
        return np.diff(self._bounds(whole)) + np.bincount(dataset, minlength=len(self.sizes))

    def _block_size(self) -> int:
        smallest = min(weight for weight in self.weights if weight) / sum(self.weights)
        # At least two positions for the rarest dataset, so that no rounded share is ever negative.
        return max(256, int(2 / smallest) + 1)

    def in_blocks(self, first: int, last: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and sample at every position of the blocks [first, last): [(last - first) * block] int64 each."""
        # [last - first + 1, datasets]: how often each dataset occurs before each block.
        drawn = np.diff([self._bounds(k * block) for k in range(first, last + 1)], axis=1)
        shares = np.diff(drawn, axis=0)
        dataset = np.zeros(len(shares) * block, np.int64)
        # The positions of a single dataset need no shuffling.
        if len(self.sizes) > 1:
            number = np.repeat(np.arange(len(shares)), block)
            seed = mix64(self.seed, 3, self.stage) if self.stage else self.seed
            keys = _mix64_each(seed, 1, first + np.arange(len(shares)))
            slots = _permute_each(np.tile(np.arange(block), len(shares)), block, keys[number])
            # Block k covers [k * block, (k + 1) * block), so that one search serves all blocks.
            ends = np.cumsum(shares, axis=1) + block * np.arange(len(shares))[:, None]
            interval = np.searchsorted(ends.ravel(), slots + block * number, side="right")
            dataset = interval - len(self.sizes) * number
        sample = np.empty_like(dataset)
        for d, taken in enumerate(self.taken or [0] * len(self.sizes)):
            sample[dataset == d] = self._shuffled(d, taken + np.arange(drawn[0, d], drawn[-1, d]))
        return dataset, sample

    @cached_property
    def _cumulative_weights(self) -> list[int]:
        """Cumulative weights of the datasets as integers in the same proportion; floats are binary fractions."""
        weights = [Fraction(weight) for weight in self.weights]
        unit = math.lcm(*(weight.denominator for weight in weights))
        return list(accumulate(int(weight * unit) for weight in weights))

    def _bounds(self, count: int) -> list[int]:
        """Cumulative shares of the datasets among the first `count` positions, rounded half to even."""
        total = self._cumulative_weights[-1]
        bounds = [0]
        for weight in self._cumulative_weights:
            whole, rest = divmod(count * weight, total)
            bounds.append(whole + (2 * rest > total or (2 * rest == total and whole % 2 == 1)))
        return bounds

    def _shuffled(self, dataset: int, turns: np.ndarray) -> np.ndarray:
        size = self.sizes[dataset]
        epochs, turn = np.divmod(turns, size)
        one = len(epochs) > 0 and epochs[0] == epochs[-1]
        keys = _mix64_each(self.seed, 2, dataset, epochs[:1] if one else epochs)
        return _permute_each(turn, size, keys)


@lru_cache(maxsize=8)
def _blocks(order: GlobalOrder, first: int, last: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Cached blocks; steps that are shorter than a block share it."""
    return order.in_blocks(first, last, block)
