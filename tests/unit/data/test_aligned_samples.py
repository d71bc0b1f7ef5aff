"""Alignments that share a run take the samples that they would take alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_anymal.config import AlignmentConfig, DatasetConfig
from megatron_anymal.data.aligned_samples import AlignedSamples
from megatron_anymal.data.mix_stages import MixStage, StagedOrder

SIZES = {"photos": 40, "sounds": 7, "drawings": 300, "speech": 90}
WEIGHTS = {"photos": 1.0, "sounds": 2.0, "drawings": 3.0, "speech": 1.0}
ALIGNMENTS = {
    "image": AlignmentConfig(datasets=["drawings", "photos"], global_batch_size=16),
    "audio": AlignmentConfig(datasets=["sounds", "speech"], global_batch_size=3, max_steps=40),
    "imu": AlignmentConfig(datasets=["motions"], global_batch_size=2),
}


def aligned(*, ends: bool = True, seed: int = 5, **changes: Any) -> AlignedSamples:
    datasets = {name: DatasetConfig(name, weight) for name, weight in (WEIGHTS | changes).items()}
    return AlignedSamples(datasets, list(SIZES.values()), ALIGNMENTS, seed, ends=ends)


def alone(name: str, step: int) -> list[tuple[str, int]]:
    """Dataset and row of each sample of a step of one alignment with the datasets in the order of the configuration."""
    own = [dataset for dataset in SIZES if dataset in ALIGNMENTS[name].datasets]
    stage = MixStage("", 0, tuple(WEIGHTS[dataset] for dataset in own))
    size = ALIGNMENTS[name].global_batch_size
    dataset, row = StagedOrder([SIZES[one] for one in own], [stage], 5).samples(step * size, (step + 1) * size)
    return [(own[number], row_number) for number, row_number in zip(dataset.tolist(), row.tolist())]


@pytest.mark.parametrize("step", [0, 1, 39, 40, 500])
@pytest.mark.parametrize("ends", [True, False])
def test_samples_are_those_of_each_alignment_alone(step: int, ends: bool) -> None:
    samples = aligned(ends=ends)
    dataset, row = samples.samples(step)
    dataset_rows = [(list(SIZES)[number], row_number) for number, row_number in zip(dataset.tolist(), row.tolist())]
    both = step < 40 or not ends
    assert dataset_rows == alone("image", step) + (alone("audio", step) if both else [])
    # An alignment without datasets, as in a validation, has no samples.
    assert [samples.names[number] for number in samples.owner[dataset]] == ["image"] * 16 + ["audio"] * 3 * both


def test_another_weight_or_seed_gives_other_samples_of_one_alignment_only() -> None:
    first = aligned().samples(3)
    for other in (aligned(photos=9.0), aligned(seed=6)):
        changed = np.stack(other.samples(3)) != np.stack(first)
        assert changed[:, :16].any()
    assert not (np.stack(aligned(photos=9.0).samples(3)) != np.stack(first))[:, 16:].any()
    assert aligned(photos=9.0).identity() != aligned().identity() == aligned().identity()
