"""Loader processes: what runs in one, how much memory it holds, and what its death means."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Optional, Protocol

import torch
from torch.utils.data import Dataset, get_worker_info

from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.plan_queue import QueuedPlan
from megatron_anymal.data.records import PlannedMicroBatch
from megatron_anymal.object_storage.errors import StorageError
from megatron_anymal.processes.child_processes import end_with_parent
from megatron_anymal.processes.process_memory import GIB, resident_bytes

# Seconds that a process may take to end after its sockets have closed.
_EXIT_SECONDS = 5.0


class WorkerDied(RuntimeError):
    """A loader process exited unexpectedly."""


def worker_died(error: BaseException, workers: Sequence[BaseProcess] = ()) -> Optional[WorkerDied]:
    """Translate torch's error about a lost loader process; None for any other error and for a `WorkerDied`.

    Args:
        workers: the loader's processes. Their exit codes reveal a signal even if torch, which can notice a death in two
            ways, reports none.
    """
    match = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: ([\w ]+))?", str(error))
    if match is None or isinstance(error, WorkerDied):
        return None
    pids = [int(pid) for pid in match[1].split(",")]
    lost = [one for one in workers if one.pid in pids]
    return _died(match[1], match[2].strip() if match[2] else _signals(lost))


def death_behind(error: BaseException, workers: Sequence[BaseProcess]) -> Optional[WorkerDied]:
    """The death of a loader process that made reading from the loader fail; None for any other error.

    A tensor's shared memory is received through a socket of the worker that wrote it. If the worker dies meanwhile, its
    socket closes before it has an exit code, and torch (2.13) raises the connection's error as it is.

    Args:
        error: raised by the loader's iterator.
        workers: the loader's processes.

    Raises:
        RuntimeError: raised by another signal handler while this waits for the processes.
    """
    if not workers or not isinstance(error, (ConnectionError, EOFError)):
        return worker_died(error, workers)
    try:
        ended = wait([one.sentinel for one in workers], _EXIT_SECONDS)
        lost = [one for one in workers if one.sentinel in ended]
        for one in lost:
            one.join(_EXIT_SECONDS)
    except RuntimeError as reported:
        # torch's handler of SIGCHLD raises its own error wherever this thread is.
        died = worker_died(reported, workers)
        if died is None:
            raise
        return died
    return _died(", ".join(str(one.pid) for one in lost), _signals(lost)) if lost else None


def _signals(lost: Sequence[BaseProcess]) -> str:
    codes = [one.exitcode for one in lost]
    return ", ".join(str(signal.strsignal(-code)) for code in codes if code is not None and code < 0)


def _died(pids: str, signals: str) -> WorkerDied:
    how = f"was killed by a signal ({signals})" if signals else "exited"
    return WorkerDied(
        f"The loader process {pids} of rank {os.environ.get('RANK', '0')} on {socket.gethostname()} {how} while it "
        "was reading samples. Often the machine ran out of memory: lower data.num_workers or data.prefetch_steps."
    )


def start_worker(number: int) -> None:
    """Set up a loader process; torch calls it there with the worker's number."""
    # The trainer keeps the cores busy; extra threads in a worker would only slow both down.
    torch.set_num_threads(1)
    # Signals sent to the whole job are handled by the trainer, which still needs its workers for the current step.
    for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(one, signal.SIG_IGN)
    # Exit with the trainer even while hanging in a read.
    end_with_parent()


@dataclass(frozen=True)
class WorkerMemory:
    """Memory of a loader process after it has read a micro-batch; see `process_memory.resident_bytes`."""

    # Number of the worker, from 0.
    worker: int
    # Its process ID.
    pid: int
    # Bytes before its first micro-batch.
    at_start: int
    # Bytes now.
    now: int
    # Micro-batches that it has read.
    micro_batches: int

    @property
    def growth(self) -> int:
        """Bytes since the start."""
        return self.now - self.at_start


class ReadMicroBatch(NamedTuple):
    """A micro-batch as it comes from the loader; a tuple, which torch's pinning thread looks into."""

    # The micro-batch.
    micro_batch: MicroBatch
    # Memory of the process that read it; None if the training process did.
    memory: Optional[WorkerMemory]


class BatchReader(Protocol):
    """Reads planned micro-batches; see data.loader.MicroBatchReader."""

    def __getitem__(self, plan: PlannedMicroBatch) -> MicroBatch:
        """Read a micro-batch."""

    def request(self, plan: PlannedMicroBatch) -> None:
        """Start to read a micro-batch that will be needed."""


class WorkerReader(Dataset[ReadMicroBatch | StorageError]):
    """Reads micro-batches, and adds the memory of the loader process that it runs in.

    An error of an object store is returned: torch would bury it in a traceback.
    """

    def __init__(self, reader: BatchReader, before_read: Optional[Callable[[int, int], None]] = None):
        """Wrap a reader.

        Args:
            before_read: called in a loader process before it reads a micro-batch, with the worker's number and the step
                (from 0).
        """
        self._reader, self._before_read = reader, before_read
        # These count in a loader process, which has its own copy of this object.
        self._at_start, self._micro_batches = 0, 0

    def __getitem__(self, queued: QueuedPlan) -> ReadMicroBatch | StorageError:
        """Read a planned micro-batch, and request the coming ones."""
        worker = get_worker_info()
        if worker is not None:
            self._at_start = self._at_start or resident_bytes()
            if self._before_read is not None:
                self._before_read(worker.id, queued.plan.step)
        try:
            for plan in (queued.plan, *queued.coming):
                self._reader.request(plan)
            micro_batch = self._reader[queued.plan]
        except StorageError as error:
            return error
        if worker is None:
            return ReadMicroBatch(micro_batch, None)
        self._micro_batches += 1
        memory = WorkerMemory(worker.id, os.getpid(), self._at_start, resident_bytes(), self._micro_batches)
        return ReadMicroBatch(micro_batch, memory)


class LoaderMemory:
    """The memory of a rank's loader processes, and which of them have outgrown their limit."""

    def __init__(self, limit_gib: float = 0.0):
        """Begin without any process.

        Args:
            limit_gib: `data.worker_memory_limit_gib`; 0: none.
        """
        self._limit = limit_gib
        # Worker -> its newest memory.
        self._newest: dict[int, WorkerMemory] = {}
        # Worker -> process ID that was reported for it.
        self._reported: dict[int, int] = {}

    def note(self, memory: WorkerMemory) -> bool:
        """Keep what a process has reported, and return whether it has outgrown its limit.

        The first time it has, a line on standard error says so: every rank has loader processes of its own.
        """
        self._newest[memory.worker] = memory
        if not self._limit or memory.growth <= self._limit * GIB:
            return False
        if self._reported.get(memory.worker) != memory.pid:
            self._reported[memory.worker] = memory.pid
            print(self._describe(memory), file=sys.stderr, flush=True)
        return True

    def largest(self) -> tuple[int, int]:
        """Bytes of the largest loader process, and of the largest growth of one since its start; 0 without any."""
        newest = self._newest.values()
        return max((m.now for m in newest), default=0), max((m.growth for m in newest), default=0)

    def _describe(self, memory: WorkerMemory) -> str:
        return (
            f"warning: loader process {memory.worker} (pid {memory.pid}) of rank {os.environ.get('RANK', '0')} on "
            f"{socket.gethostname()} grew from {memory.at_start / GIB:.2f} to {memory.now / GIB:.2f} GiB in "
            f"{memory.micro_batches} micro-batch(es), more than data.worker_memory_limit_gib={self._limit} allows. "
            "This rank's loader processes are restarted; the data stay the same."
        )
