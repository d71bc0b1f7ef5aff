"""Which pipeline stage encodes which media: compared with the best of all assignments, and with idle times by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from megatron_anymal.data.records import PlannedMedia, PlannedMicroBatch, PlannedSample
from megatron_anymal.data.stage_shares import StageShares


def planned(pieces: list[dict[str, int]]) -> tuple[PlannedMicroBatch, ...]:
    """Micro-batches of one sample each, with these pieces of each modality."""
    return tuple(
        PlannedMicroBatch(
            0, 8, (PlannedSample(n, 0, n, (8,), 4, tuple(PlannedMedia(*item) for item in media.items())),)
        )
        for n, media in enumerate(pieces)
    )


def loads(shares: StageShares, micro_batches: tuple[PlannedMicroBatch, ...]) -> list[float]:
    """Work of each stage under the shares."""
    work = [0.0] * shares.stages
    for micro_batch in shares.assign(micro_batches):
        for sample in micro_batch.samples:
            for item in sample.media:
                work[micro_batch.encoder_stage(item.modality)] += item.pieces * shares.costs.get(item.modality, 0.0)
    return work


def lateness(work: tuple[float, ...] | list[float], slot: float) -> float:
    """Work of the busiest stage beyond its wait of as many slots as its number."""
    return max(own - stage * slot for stage, own in enumerate(work))


def test_close_to_the_best_assignment() -> None:
    rng = np.random.default_rng(0)
    for trial in range(20):
        pieces = [int(n) for n in rng.integers(0, 9, 6)]
        shares = StageShares(3, {"image": 1.0}, float(trial % 5))
        own = lateness(loads(shares, planned([{"image": n} for n in pieces])), shares.slot)
        best = min(
            lateness([sum(n for n, at in zip(pieces, places) if at == stage) for stage in range(3)], shares.slot)
            for places in itertools.product(range(3), repeat=len(pieces))
        )
        # Within the bound of assigning the largest first (Graham 1969); waits count as work that is done.
        assert own <= max(best, 0.0) + max(pieces) / 3 + 1e-9


@pytest.mark.parametrize("micro_batches", [4, 8, 16])
def test_all_of_it_fits_into_the_waits(micro_batches: int) -> None:
    """Four stages wait for 0, 1, 2 and 3 slots; each micro-batch's media take a third of a slot."""
    shares = StageShares(4, {"image": 1.0}, 3.0)
    work = loads(shares, planned([{"image": 1}] * micro_batches))
    assert sum(work) == micro_batches and work[0] == 0
    assert all(own <= 3 * stage for stage, own in enumerate(work))
    # None is filled much more than another.
    assert max(own - micro_batches * stage / 6 for stage, own in enumerate(work)) <= 1


def test_the_remainder_is_shared_evenly() -> None:
    shares = StageShares(4, {"image": 1.0}, 2.0)
    late = [own - 2 * stage for stage, own in enumerate(loads(shares, planned([{"image": 1}] * 100)))]
    assert max(late) - min(late) <= 1 and sum(late) == 100 - 12


def test_modalities_are_balanced_by_their_cost_and_free_ones_stay() -> None:
    shares = StageShares(2, {"image": 8.0, "imu": 1.0, "audio": 0.0}, 0.0)
    batches = planned([{"image": 1, "imu": 8, "audio": 5, "codes": 3}] * 4)
    assert loads(shares, batches) == [32.0, 32.0]
    stages = Counter(
        (name, batch.encoder_stage(name)) for batch in shares.assign(batches) for name in ("audio", "codes")
    )
    assert stages == {("audio", 0): 4, ("codes", 0): 4}


def test_only_the_stages_change() -> None:
    batches = planned([{"image": 2}, {}, {"imu": 1}])
    assigned = StageShares(2, {"image": 1.0, "imu": 1.0}, 5.0).assign(batches)
    assert [batch.samples for batch in assigned] == [batch.samples for batch in batches]
    assert [batch.encoded_on for batch in assigned] == [(("image", 1),), (), (("imu", 1),)]
