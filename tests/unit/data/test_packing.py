"""Packs hold every document exactly once, stay within capacity, come in the requested number, and are well filled."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_anymal.data.packing import pack

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from packing import CAPACITY, long_tailed_mix, measure


def checked(lengths: np.ndarray, costs: np.ndarray, capacity: int, multiple: int) -> list[list[int]]:
    packs = pack(lengths, costs, capacity, multiple)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert max((int(lengths[p].sum()) for p in packs if p), default=0) <= capacity
    assert len(packs) % multiple == 0 and len(packs) >= multiple
    assert all(p == sorted(p) for p in packs)
    return packs


@pytest.mark.parametrize("seed", range(30))
def test_no_document_is_lost_or_doubled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity, multiple = int(rng.integers(5, 200)), int(rng.integers(1, 9))
    lengths = rng.integers(1, capacity + 1, size=int(rng.integers(0, 150)))
    packs = checked(lengths, rng.uniform(0, 100, len(lengths)), capacity, multiple)
    # Best-fit decreasing needs at most 11/9 of the minimum number of packs, plus four.
    fewest = -(-int(lengths.sum()) // capacity)
    half = int((lengths > capacity / 2).sum())
    assert len(packs) <= 11 / 9 * max(fewest, half) * 1.25 + 4 + multiple


def test_the_same_documents_give_the_same_packs() -> None:
    lengths, costs = long_tailed_mix(300, seed=3)
    assert pack(lengths, costs, CAPACITY, 4) == pack(lengths.copy(), costs.copy(), CAPACITY, 4)


@pytest.mark.parametrize(
    ("count", "capacity", "multiple", "costs", "longest", "recorded"),
    [
        (40, 1000, 4, 1, 7, "ce7da2fcc2835909"),
        (300, 1000, 8, 5, 997, "83b91d1b1434c958"),
        (2000, 4000, 1, 5, 997, "207685cc26291907"),
        (2000, 1000, 64, 5, 997, "43f9d680b596b331"),
    ],
)
def test_packs_are_those_of_earlier_versions(
    count: int, capacity: int, multiple: int, costs: int, longest: int, recorded: str
) -> None:
    """A resumed run must get the packs it would have got. `costs` is the number of different costs."""
    number = np.arange(count)
    packs = pack(number * 7919 % longest + 1, number * 31 % costs + 0.5, capacity, multiple)
    assert hashlib.sha256(json.dumps(packs).encode()).hexdigest().startswith(recorded)


def test_fewer_documents_than_packs() -> None:
    packs = checked(np.array([3, 5]), np.array([0.0, 1.0]), 8, 4)
    assert len(packs) == 4 and sorted(len(p) for p in packs) == [0, 0, 1, 1]


@pytest.mark.parametrize("multiple", [1, 3])
def test_no_document(multiple: int) -> None:
    assert pack(np.zeros(0, np.int64), np.zeros(0), 8, multiple) == [[]] * multiple


def test_documents_as_long_as_a_pack() -> None:
    packs = checked(np.full(5, 8), np.zeros(5), 8, 2)
    assert len(packs) == 6 and sorted(len(p) for p in packs) == [0, 1, 1, 1, 1, 1]


def test_a_tight_fit_is_kept_where_dealing_out_does_not_fit() -> None:
    # 6+4, 5+5, 4+3+3: only a tight packing fits in three packs.
    packs = checked(np.array([6, 5, 5, 4, 4, 3, 3]), np.zeros(7), 10, 1)
    assert len(packs) == 3


def test_packs_are_balanced_in_tokens_and_in_encoder_work() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, size=400)
    # A quarter of the documents carries all the encoder work.
    costs = np.where(np.arange(400) % 4 == 0, rng.uniform(1, 5, 400), 0.0)
    packs = checked(lengths, costs, 8192, 8)
    tokens = np.array([lengths[p].sum() for p in packs])
    work = np.array([costs[p].sum() for p in packs])
    assert tokens.max() / tokens.mean() < 1.05
    assert work.max() / work.mean() < 1.05


def test_most_loaded_packs_come_first() -> None:
    lengths, costs = long_tailed_mix(500, seed=1)
    packs = pack(lengths, costs, CAPACITY, 6)
    load = [sum(max(lengths[i] / lengths.sum(), costs[i] / costs.sum()) for i in p) for p in packs]
    assert load == sorted(load, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_packs_of_a_long_tailed_mix_are_97_percent_full(seed: int) -> None:
    lengths, costs = long_tailed_mix(1024, seed)
    result = measure(lengths, costs, multiple=1)
    print(f"\nreal tokens: {result.share:.2%} in {result.packs} packs (at least {result.fewest})")
    assert result.share >= 0.97
