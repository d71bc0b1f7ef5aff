"""The order in which loader processes read planned micro-batches, and what they read ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional, Protocol

from torch.utils.data import Dataset, Sampler, get_worker_info

from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.planner import BatchPlanner, StepPlan
from megatron_anymal.data.records import PlannedMicroBatch
from megatron_anymal.object_storage.errors import StorageError


class Reader(Protocol):
    """Reads planned micro-batches; see data.loader.MicroBatchReader."""

    def __getitem__(self, plan: PlannedMicroBatch) -> MicroBatch:
        """Read a micro-batch."""

    def request(self, plan: PlannedMicroBatch) -> None:
        """Start to read a micro-batch that will be needed."""


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
            plan = self._planner.plan(step)
            self.plans.append(plan)
            yield from plan.of_replica(self._replica)


class QueuedReads(Dataset[MicroBatch | StorageError]):
    """Reads in a worker process. An error of an object store is returned: torch would bury it in a traceback.

    Args:
        before_read: called in a worker before it reads a micro-batch, with the worker's id and the step.
    """

    def __init__(self, reader: Reader, before_read: Optional[Callable[[int, int], None]] = None):
        self._reader, self._before_read = reader, before_read

    def __getitem__(self, queued: QueuedPlan) -> MicroBatch | StorageError:
        """Read a micro-batch, and request the coming ones."""
        worker = get_worker_info()
        if worker is not None and self._before_read is not None:
            self._before_read(worker.id, queued.plan.step)
        try:
            for plan in (queued.plan, *queued.coming):
                self._reader.request(plan)
            return self._reader[queued.plan]
        except StorageError as error:
            return error
