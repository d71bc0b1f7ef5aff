"""Packs hold every document exactly once, stay within capacity, come in the requested number, and are well filled and
balanced: compared with lower bounds, with brute force, and with best-fit decreasing one document at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_anymal.data.packing import best_fit_decreasing, deal, pack

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from packing import CAPACITY, long_tailed_mix, measure


def checked(lengths: np.ndarray, costs: np.ndarray, capacity: int, multiple: int, replicas: int = 1) -> list[list[int]]:
    packs = pack(lengths, costs, capacity, multiple, replicas=replicas)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert max((int(lengths[p].sum()) for p in packs if p), default=0) <= capacity
    assert len(packs) % multiple == 0 and len(packs) >= multiple
    assert all(p == sorted(p) for p in packs)
    return packs


@pytest.mark.parametrize("seed", range(30))
def test_no_document_is_lost_or_doubled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity, replicas = int(rng.integers(5, 200)), int(rng.integers(1, 4))
    multiple = replicas * int(rng.integers(1, 4))
    lengths = rng.integers(1, capacity + 1, size=int(rng.integers(0, 150)))
    packs = checked(lengths, rng.integers(0, 100, len(lengths)), capacity, multiple, replicas)
    # Best-fit decreasing needs at most 11/9 of the minimum number of packs, plus four.
    fewest = -(-int(lengths.sum()) // capacity)
    half = int((lengths > capacity / 2).sum())
    assert len(packs) <= 11 / 9 * max(fewest, half) * 1.25 + 4 + multiple


def test_the_same_documents_give_the_same_packs() -> None:
    lengths, costs = long_tailed_mix(300, seed=3)
    assert pack(lengths, costs, CAPACITY, 4) == pack(lengths.copy(), costs.copy(), CAPACITY, 4)


@pytest.mark.parametrize("replicas", [1, 4])
def test_the_unit_of_the_costs_does_not_matter(replicas: int) -> None:
    lengths, costs = long_tailed_mix(300, seed=3)
    packs = pack(lengths, costs, CAPACITY, 8, replicas=replicas)
    assert packs == pack(lengths, costs * 997, CAPACITY, 8, replicas=replicas)


@pytest.mark.parametrize(
    ("count", "capacity", "multiple", "replicas", "costs", "longest", "recorded"),
    [
        (40, 1000, 4, 1, 1, 7, "ce7da2fcc2835909"),
        (300, 1000, 8, 4, 5, 997, "20f9e94082c14136"),
        (2000, 4000, 1, 1, 5, 997, "6cb921e54e31e3a4"),
        (2000, 1000, 64, 32, 5, 997, "f08627844947de37"),
    ],
)
def test_packs_are_those_of_earlier_versions(
    count: int, capacity: int, multiple: int, replicas: int, costs: int, longest: int, recorded: str
) -> None:
    """A resumed run must get the packs it would have got, on every platform. `costs` is the number of different costs.

    A legitimate change of the packing changes these hashes; it changes results of runs by rounding only.
    """
    number = np.arange(count, dtype=np.int64)
    lengths, work = number * 7919 % longest + 1, number * 31 % costs + 1
    packs = pack(lengths, work, capacity, multiple, replicas=replicas, length_multiple=8)
    assert hashlib.sha256(json.dumps(packs).encode()).hexdigest().startswith(recorded)


def test_fewer_documents_than_packs() -> None:
    packs = checked(np.array([3, 5]), np.array([0, 1]), 8, 4)
    assert len(packs) == 4 and sorted(len(p) for p in packs) == [0, 0, 1, 1]


@pytest.mark.parametrize("multiple", [1, 3])
def test_no_document(multiple: int) -> None:
    assert pack(np.zeros(0, np.int64), np.zeros(0, np.int64), 8, multiple) == [[]] * multiple


def test_documents_as_long_as_a_pack() -> None:
    packs = checked(np.full(5, 8), np.zeros(5, np.int64), 8, 2)
    assert len(packs) == 6 and sorted(len(p) for p in packs) == [0, 1, 1, 1, 1, 1]


def test_a_tight_fit_is_kept_where_dealing_out_does_not_fit() -> None:
    # 6+4, 5+5, 4+3+3: only a tight packing fits in three packs.
    packs = checked(np.array([6, 5, 5, 4, 4, 3, 3]), np.zeros(7, np.int64), 10, 1)
    assert len(packs) == 3


def test_packs_are_balanced_in_tokens_and_in_encoder_work() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, size=400)
    # A quarter of the documents carries all the encoder work.
    costs = np.where(np.arange(400) % 4 == 0, rng.integers(100, 500, 400), 0)
    packs = checked(lengths, costs, 8192, 8)
    tokens = np.array([lengths[p].sum() for p in packs])
    work = np.array([costs[p].sum() for p in packs])
    assert tokens.max() / tokens.mean() < 1.05
    assert work.max() / work.mean() < 1.05


def test_costliest_packs_come_first() -> None:
    lengths, costs = long_tailed_mix(500, seed=1)
    work = [int(costs[p].sum()) for p in pack(lengths, costs, CAPACITY, 6)]
    assert work == sorted(work, reverse=True) and work[0] > work[-1]


def test_replicas_work_on_similar_costs_at_the_same_time() -> None:
    lengths, costs = long_tailed_mix(4000)
    work = np.array([costs[p].sum() for p in pack(lengths, costs, CAPACITY, 32, replicas=8)]).reshape(-1, 8)
    # Spread among the packs that run at the same time, and among all packs.
    assert work.std(axis=1).mean() < work.std() / 3


def naive_best_fit(lengths: np.ndarray, capacity: int) -> list[int]:
    """Lengths of the packs of best-fit decreasing, one document at a time."""
    packs: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [k for k, filled in enumerate(packs) if filled + length <= capacity]
        if fitting:
            packs[max(fitting, key=lambda k: packs[k])] += length
        else:
            packs.append(length)
    return sorted(packs)


@pytest.mark.parametrize("seed", range(40))
def test_best_fit_decreasing_is_that_of_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(3, 300))
    lengths = rng.integers(1, max(2, capacity // int(rng.integers(1, 8))) + 1, size=int(rng.integers(1, 200)))
    lengths = np.minimum(lengths, capacity)
    pack_of = best_fit_decreasing(lengths, capacity)
    assert sorted(np.bincount(pack_of, lengths).astype(int).tolist()) == naive_best_fit(lengths, capacity)


@pytest.mark.parametrize("seed", range(20))
def test_dealing_keeps_the_bound_of_the_lpt_rule(seed: int) -> None:
    """The longest pack exceeds the mean by less than the document that was dealt to it last."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 12))
    lengths = rng.integers(1, 500, size=int(rng.integers(count, 300)))
    tokens = np.bincount(deal(lengths, rng.integers(0, 9, len(lengths)), count), lengths, count)
    assert tokens.max() <= lengths.sum() / count + lengths.max()
    assert (tokens > 0).all()


def all_loads(values: np.ndarray, packs: int) -> np.ndarray:
    """[packs ** n, packs]: load of each pack, for every way to distribute n values."""
    of = np.array(list(itertools.product(range(packs), repeat=len(values))))
    return np.stack([(values * (of == k)).sum(axis=1) for k in range(packs)], axis=1)


def test_small_batches_against_brute_force() -> None:
    """Two replicas with one pack each: the length is close to the optimum, and so is the cost at that length."""
    cost_ratios = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        lengths, costs = rng.integers(10, 100, size=9), rng.integers(0, 50, size=9)
        packs = checked(lengths, costs, 1000, 2, 2)
        assert len(packs) == 2
        longest = max(int(lengths[p].sum()) for p in packs)
        tokens, work = all_loads(lengths, 2).max(axis=1), all_loads(costs, 2).max(axis=1)
        assert tokens.min() <= longest <= tokens.min() * 1.02
        cost_ratios.append(max(int(costs[p].sum()) for p in packs) / work[tokens <= longest].min())
    assert min(cost_ratios) >= 1 and np.mean(cost_ratios) < 1.1 and max(cost_ratios) < 1.35


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("samples", "multiple"), [(1024, 8), (26_880, 64)])
def test_packs_of_a_long_tailed_mix(samples: int, multiple: int, seed: int) -> None:
    """As few packs as their tokens allow, as full as the longest document allows, and even costs."""
    lengths, costs = long_tailed_mix(samples, seed)
    result = measure(lengths, costs, multiple, replicas=8, length_multiple=64)
    assert result.packs == -(-result.fewest // multiple) * multiple
    mean = lengths.sum() / result.packs
    assert result.share >= min(0.99, mean / (-(-lengths.max() // 64) * 64))
    assert result.cost_over_replicas <= 1.05


def test_packs_with_room_even_out_costs_further() -> None:
    """If packs need no padding, up to one percent of it is accepted for replicas of similar cost."""
    lengths, costs = long_tailed_mix(1024)
    packs = pack(lengths, costs, CAPACITY, 8, replicas=8, length_multiple=1)
    work = np.array([sum(costs[chosen].sum() for chosen in packs[replica::8]) for replica in range(8)])
    longest, mean = max(lengths[chosen].sum() for chosen in packs), lengths.sum() / len(packs)
    assert work.max() <= 1.03 * work.mean() and longest <= 1.01 * mean + 1
