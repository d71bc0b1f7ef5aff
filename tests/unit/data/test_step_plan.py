"""A plan's media, of several datasets, are those of its samples; samples become objects for one replica at a time."""

from __future__ import annotations

import numpy as np
import torch

from megatron_anymal.data.records import PlannedMedia
from megatron_anymal.data.step_plan import BatchMedia, StepPlan
from megatron_anymal.train.objective import GlobalBatch

ITEMS = [[(1, 4), (0, 2)], [], [(0, 7)], [(2, 1), (2, 1), (1, 3)], []]
NAMES = ("image", "audio", "imu")


def media() -> BatchMedia:
    flat = np.array([item for items in ITEMS for item in items])
    return BatchMedia(NAMES, np.cumsum([0, *map(len, ITEMS)]), flat[:, 0], flat[:, 1])


def plan() -> StepPlan:
    return StepPlan(
        step=4,
        dataset=np.array([0, 1, 0, 0, 1]),
        sample=np.array([9, 8, 7, 6, 5]),
        documents=np.array([[10, 0], [20, 0], [30, 5], [40, 0], [900, 0]]),
        targets=np.array([4, 5, 6, 7, 0]),
        media=media(),
        dropped=(4,),
        micro_batches=(((0, 2), (1,)), ((3,), ())),
        padded_length=64,
        document_multiple=2,
        shared=np.zeros(5, np.int64),
    )


def test_media_of_samples() -> None:
    for position, items in enumerate(ITEMS):
        assert media().of(position) == tuple(PlannedMedia(NAMES[name], pieces) for name, pieces in items)
    assert media().first_modality().tolist() == [1, -1, 0, 2, -1]


def test_a_batch_without_media() -> None:
    none = BatchMedia(NAMES, np.zeros(4, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert none.first_modality().tolist() == [-1, -1, -1] and none.of(2) == ()


def test_samples_of_a_replica() -> None:
    first, second = plan().of_replica(0)
    assert [sample.position for sample in first.samples] == [0, 2] and [s.sample for s in second.samples] == [8]
    assert first.samples[1].documents == (30, 5) and first.samples[0].documents == (10,)
    assert first.samples[0].media == (PlannedMedia("audio", 4), PlannedMedia("image", 2))
    assert (first.step, first.padded_length, first.document_multiple) == (4, 64, 2)
    assert plan().of_replica(1)[1].samples == ()


def test_tokens_are_those_of_the_samples_that_are_kept() -> None:
    assert plan().tokens == 10 + 20 + 35 + 40


def test_losses_are_reported_by_the_first_item() -> None:
    names = ["text", "imu", "image", "audio"]
    batch = GlobalBatch.of(plan(), {2: "damaged"}, names, torch.device("cpu"))
    assert [names[group] for group in batch.groups.tolist()] == ["audio", "text", "image", "imu", "text"]
    assert batch.counts == (4, 5, 0, 7, 0)
