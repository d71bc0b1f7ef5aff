"""The order in which loader processes read planned micro-batches, and what they read ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

from megatron_anymal.data.planner import BatchPlanner
from megatron_anymal.data.records import PlannedMicroBatch
from megatron_anymal.data.step_plan import StepPlan


@dataclass(frozen=True)
class QueuedPlan:
    """A micro-batch to read."""

    # The micro-batch.
    plan: PlannedMicroBatch
    # The next ones of the same worker, to be requested from object storage meanwhile.
    coming: tuple[PlannedMicroBatch, ...] = ()


class PlanSampler(Sampler[QueuedPlan]):
    """Plans steps as far ahead as the loader prefetches, and keeps each plan until its step runs.

    Args:
        replica: the data-parallel replica whose micro-batches are read.
        start: first step.
        stop: step after the last one.
        workers: number of processes that take micro-batches in turns.
        read_ahead: number of coming micro-batches of the same worker to add to each.
    """

    def __init__(self, planner: BatchPlanner, replica: int, start: int, stop: int, workers: int, read_ahead: int):
        self._planner, self._replica, self._steps = planner, replica, range(start, stop)
        self._workers, self._read_ahead = max(1, workers), read_ahead
        # Plans of the steps that have not run.
        self.plans: deque[StepPlan] = deque()
        # Set to plan no further step than those in progress.
        self.ended = False

    def __iter__(self) -> Iterator[QueuedPlan]:
        """The micro-batches in the order of the steps."""
        ahead: deque[PlannedMicroBatch] = deque()
        for plan in self._micro_batches():
            ahead.append(plan)
            if len(ahead) > self._workers * self._read_ahead:
                yield self._next(ahead)
        while ahead:
            yield self._next(ahead)

    def _next(self, ahead: deque[PlannedMicroBatch]) -> QueuedPlan:
        plan, *rest = ahead
        ahead.popleft()
        return QueuedPlan(plan, tuple(rest[self._workers - 1 :: self._workers]))

    def _micro_batches(self) -> Iterator[PlannedMicroBatch]:
        for step in self._steps:
            if self.ended:
                return
            plan = self._planner.plan(step)
            self.plans.append(plan)
            yield from plan.of_replica(self._replica)
