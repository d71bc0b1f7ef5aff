"""Each loader process is given ahead exactly the micro-batches that it will be handed next."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megatron_anymal.data.plan_queue import PlanSampler, QueuedPlan
from megatron_anymal.data.records import PlannedMicroBatch


@dataclass
class Plan:
    """A step of several micro-batches, whose lengths number them."""

    step: int
    per_step: int

    def of_replica(self, replica: int) -> tuple[PlannedMicroBatch, ...]:
        first = self.step * self.per_step
        return tuple(PlannedMicroBatch(self.step, n, ()) for n in range(first, first + self.per_step))


def sampler(workers: int, read_ahead: int, steps: int = 5, per_step: int = 3) -> PlanSampler:
    planner: Any = SimpleNamespace(plan=lambda step: Plan(step, per_step))
    return PlanSampler(planner, 0, 0, steps, workers, read_ahead)


@pytest.mark.parametrize("workers", [0, 1, 2, 4, 20])
@pytest.mark.parametrize("read_ahead", [0, 1, 2, 6])
def test_coming_micro_batches(workers: int, read_ahead: int) -> None:
    queued = list(sampler(workers, read_ahead))
    assert [one.plan.padded_length for one in queued] == list(range(15))
    for number, one in enumerate(queued):
        following = range(number, 15, max(1, workers))[1 : read_ahead + 1]
        assert [plan.padded_length for plan in one.coming] == list(following)


def test_plans_are_kept_until_their_step_runs() -> None:
    ahead = sampler(2, 1)
    run = iter(ahead)
    next(run)
    # The first micro-batch of the next step's plan is known; later steps are not planned yet.
    assert [plan.step for plan in ahead.plans] == [0]
    assert len(list(run)) == 14 and [plan.step for plan in ahead.plans] == [0, 1, 2, 3, 4]


def test_no_step_is_planned_after_the_end() -> None:
    """Steps that are already planned are read completely."""
    ahead = sampler(2, 2)
    run = iter(ahead)
    first = next(run)
    assert [plan.step for plan in ahead.plans] == [0, 1]
    ahead.ended = True
    assert [one.plan.padded_length for one in (first, *run)] == list(range(6))
    assert [plan.step for plan in ahead.plans] == [0, 1]


class Workers(Dataset[tuple[int, int, list[int]]]):
    """Number of a micro-batch, the worker that has it, and the micro-batches announced to that worker."""

    def __getitem__(self, queued: QueuedPlan) -> tuple[int, int, list[int]]:
        worker = get_worker_info()
        assert worker is not None
        return queued.plan.padded_length, worker.id, [plan.padded_length for plan in queued.coming]


@pytest.mark.parametrize("workers", [1, 3])
def test_torch_hands_them_to_the_same_worker(workers: int) -> None:
    loader: Any = DataLoader(Workers(), batch_size=None, sampler=sampler(workers, 2), num_workers=workers)
    results = list(loader)
    worker_of = {number: worker for number, worker, _ in results}
    assert len(set(worker_of.values())) == workers
    for _, worker, coming in results:
        assert all(worker_of[number] == worker for number in coming)
