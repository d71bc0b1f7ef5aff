"""The global order consists of exact permutations, and any slice of it can be computed independently."""

from __future__ import annotations

import time
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from megatron_anymal.data.global_order import GlobalOrder, mix64, permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 16, 17, 100, 255, 256, 257, 1000, 4097, 70_000])
@pytest.mark.parametrize("key", [0, 1, 2**63, -5, 123456789])
def test_permute_is_a_permutation(n: int, key: int) -> None:
    np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_of_some_places_is_that_of_all() -> None:
    whole = permute(np.arange(1000), 1000, 3)
    some = np.array([999, 0, 17, 17])
    np.testing.assert_array_equal(permute(some, 1000, 3), whole[some])


def test_keys_give_unlike_orders() -> None:
    orders = [permute(np.arange(500), 500, key) for key in range(20)]
    for i, one in enumerate(orders):
        assert not np.array_equal(one, np.arange(500))
        for other in orders[:i]:
            # Two random orders agree in about one position.
            assert (one == other).sum() < 12


def test_permute_spreads_evenly() -> None:
    # Position of the first of 50 elements under 2,500 keys: each position about 50 times (standard deviation 7).
    places = np.array([int(permute(np.array([0]), 50, key)[0]) for key in range(2500)])
    counts = np.bincount(places, minlength=50)
    assert counts.min() > 18 and counts.max() < 90


def test_mix64_depends_on_every_number_and_their_order() -> None:
    assert len({mix64(1, 2), mix64(2, 1), mix64(1), mix64(2), mix64(1, 2, 0), mix64()}) == 6
    assert all(0 <= mix64(k) < 2**64 for k in range(-50, 50))


@pytest.mark.parametrize("sizes", [(1,), (7,), (10, 1, 300), (5, 5)])
def test_every_epoch_of_every_dataset_is_a_permutation(sizes: tuple[int, ...]) -> None:
    weights = tuple(1.0 + d for d in range(len(sizes)))
    dataset, sample = GlobalOrder(sizes, weights, seed=11).samples(0, 2_000)
    for number, size in enumerate(sizes):
        mine = sample[dataset == number]
        epochs = len(mine) // size
        assert epochs >= 2
        # Blocks are shuffled, so epochs that meet within one block mix: count how often each sample occurs.
        counts = np.bincount(mine, minlength=size)
        assert counts.sum() == len(mine) and counts.max() - counts.min() <= 2


@pytest.mark.parametrize("seed", [0, 5])
def test_one_dataset_runs_through_exact_epochs_in_new_orders(seed: int) -> None:
    size = 37
    _, sample = GlobalOrder((size,), (1.0,), seed).samples(0, size * 40)
    epochs = sample.reshape(40, size)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    assert len({tuple(epoch) for epoch in epochs}) == 40


def test_seeds_differ_and_repeat() -> None:
    one, again, other = (GlobalOrder((50, 60), (1.0, 2.0), seed).samples(100, 400) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one[0], other[0]) and not np.array_equal(one[1], other[1])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.2, 0.1), (1.0, 3.0, 5.5, 0.01), (1e-3, 1.0)])
def test_shares_hold_over_any_stretch(weights: tuple[float, ...]) -> None:
    order = GlobalOrder(tuple(1000 for _ in weights), weights, seed=2)
    shares = np.array(weights) / sum(weights)
    dataset, _ = order.samples(0, 50_000)
    counts = np.bincount(dataset, minlength=len(weights))
    block = order._block_size()
    # Exact up to rounding over whole blocks; the last, incomplete block may be off by its size.
    np.testing.assert_allclose(counts, shares * 50_000, atol=min(block, 60))
    whole = np.bincount(dataset[: 50_000 // block * block], minlength=len(weights))
    np.testing.assert_allclose(whole, shares * (50_000 // block * block), atol=1.0)


def test_a_mix_is_a_mix_within_a_batch() -> None:
    dataset, _ = GlobalOrder((1000, 1000), (1.0, 1.0), seed=2).samples(0, 64_000)
    in_batches = dataset.reshape(-1, 64).sum(axis=1)
    assert in_batches.min() >= 12 and in_batches.max() <= 52


def block_by_block(order: GlobalOrder, start: int, stop: int) -> list[tuple[int, int]]:
    """The order as its definition states it, one position at a time."""
    weights = [Fraction(weight) for weight in order.weights]
    bounds = [sum(weights[:d]) / sum(weights) for d in range(len(weights) + 1)]
    block = order._block_size()
    samples = []
    for k in range(start // block, -(-stop // block)):
        before, after = ([round(at * bound) for bound in bounds] for at in (k * block, (k + 1) * block))
        drawn = [high - low for low, high in pairwise(before)]
        shares = [high - low - d for low, high, d in zip(after, after[1:], drawn)]
        for slot in permute(np.arange(block), block, mix64(order.seed, 1, k)).tolist():
            d = next(d for d in range(len(shares)) if slot < sum(shares[: d + 1]))
            epoch, turn = divmod(drawn[d], order.sizes[d])
            drawn[d] += 1
            key = mix64(order.seed, 2, d, epoch)
            samples.append((d, int(permute(np.array([turn]), order.sizes[d], key)[0])))
    return samples[start % block : start % block + stop - start]


@pytest.mark.parametrize(
    ("sizes", "weights"), [((70,), (1.0,)), ((40, 300, 90), (5.0, 1.0, 0.3)), ((9, 500), (0.1, 0.7))]
)
def test_the_order_is_that_of_its_definition(sizes: tuple[int, ...], weights: tuple[float, ...]) -> None:
    order = GlobalOrder(sizes, weights, seed=6)
    for start, stop in ((0, 700), (1000, 1010), (511, 513), (700, 1025), (0, 700)):
        dataset, sample = order.samples(start, stop)
        assert list(zip(dataset.tolist(), sample.tolist())) == block_by_block(order, start, stop)
        # What a caller does to the arrays does not change the order.
        dataset[:], sample[:] = -1, -1


def test_slices_equal_the_whole() -> None:
    order = GlobalOrder((40, 300, 90), (5.0, 1.0, 0.5), seed=4)
    whole = np.stack(order.samples(0, 3000))
    rng = np.random.default_rng(0)
    for _ in range(25):
        start = int(rng.integers(0, 2999))
        stop = int(rng.integers(start + 1, 3001))
        np.testing.assert_array_equal(np.stack(order.samples(start, stop)), whole[:, start:stop])


def test_a_thousand_million_samples_need_no_list() -> None:
    order = GlobalOrder((10**9, 3 * 10**9), (1.0, 2.0), seed=1)
    begun = time.process_time()
    dataset, sample = order.samples(7 * 10**8, 7 * 10**8 + 2048)
    assert time.process_time() - begun < 0.5
    assert len(set(zip(dataset.tolist(), sample.tolist()))) == 2048
    for number, size in enumerate((10**9, 3 * 10**9)):
        mine = sample[dataset == number]
        assert mine.min() >= 0 and mine.max() < size and mine.max() > size // 2
