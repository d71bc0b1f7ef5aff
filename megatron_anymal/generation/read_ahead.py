"""Reads prompts that are answered next in other processes, while the model computes.

Threads would gain little: the Python code around the decoders and the launching of kernels contend for the GIL.
"""

from __future__ import annotations

import multiprocessing
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import Any, Generic, Optional, TypeVar

import numpy as np
import torch

from megatron_anymal.data.loader_workers import start_worker
from megatron_anymal.data.records import DataError
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.processes.child_processes import share_of_cores

Read = TypeVar("Read")
# Beyond that the model, not reading, takes the time.
_MOST_PROCESSES = 8
# Groups that are handed over together: each message between processes costs as much as reading a small image.
_MOST_GROUPS = 16
# In a reading process: the function that reads, inherited through the fork.
_READ: list[Callable[[Sequence[Prompt]], Any]] = []


class ReadAhead(Generic[Read]):
    """Results of `read` for groups of prompts, made in advance for those that were announced."""

    def __init__(self, read: Callable[[Sequence[Prompt]], Read]):
        """Nothing is read in advance until `processes` is above 0; they start with the first announcement.

        Args:
            read: reads prompts that are read together; in a process forked from this one, so without a GPU.
        """
        self.processes = 0
        self._read = read
        self._pool: Optional[ProcessPoolExecutor] = None
        # By the identity of a group's prompts, which are kept alive: the groups read with it, and its number there.
        self._pending: dict[tuple[int, ...], tuple[Sequence[Prompt], Future[list[Any]], int]] = {}

    def announce(self, groups: Sequence[Sequence[Prompt]]) -> None:
        """Begin to read these groups, in this order; earlier announcements that are not repeated are dropped.

        Raises:
            DataError: a reading process exited unexpectedly.
        """
        if not self.processes:
            return
        if self._pool is None:
            # Forked as the loader's processes are: a reader with a plug-in or a folder's own code need not be pickled.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self.processes, context, _start, (weakref.ref(self),))
            # A process that multiprocessing has started waits for its children before the pool would tell them to end.
            # The priority is above that of multiprocessing.Queue (10), by which the pool tells them.
            Finalize(self, _shut_down, (self._pool,), exitpriority=20)
        before, self._pending = self._pending, {}
        new = {}
        for group in groups:
            key = _key(group)
            if key in before:
                self._pending[key] = before.pop(key)
            elif key not in self._pending:
                new[key] = group
        keys, size = list(new), max(1, min(_MOST_GROUPS, len(new) // (2 * self.processes)))
        for together in (keys[start : start + size] for start in range(0, len(keys), size)):
            future = self._submit(self._pool, [new[key] for key in together])
            self._pending.update({key: (new[key], future, number) for number, key in enumerate(together)})
        kept = {id(future) for _, future, _ in self._pending.values()}
        for _, dropped, _ in before.values():
            if id(dropped) not in kept:
                dropped.cancel()

    def take(self, group: Sequence[Prompt]) -> Read:
        """The result for a group, read now unless it was announced. What `read` raised is raised here.

        Raises:
            DataError: a reading process exited unexpectedly.
        """
        _, pending, number = self._pending.pop(_key(group), (group, None, 0))
        if pending is None:
            return self._read(group)
        try:
            result = pending.result()[number]
        except BrokenProcessPool as error:
            raise _died() from error
        if isinstance(result, Exception):
            raise result
        read: Read = result
        return read

    @staticmethod
    def _submit(pool: ProcessPoolExecutor, groups: Sequence[Sequence[Prompt]]) -> Future[list[Any]]:
        try:
            return pool.submit(_read_here, groups)
        except BrokenProcessPool as error:
            raise _died() from error


def reading_processes() -> int:
    """Number of processes that can read alongside this one: its share of the machine's cores but one, at most 8."""
    return min(_MOST_PROCESSES, share_of_cores() - 1)


def _shut_down(pool: ProcessPoolExecutor) -> None:
    # The pool's own thread, in which garbage may be collected, cannot wait for itself.
    pool.shutdown(wait=threading.current_thread() is threading.main_thread(), cancel_futures=True)


def _died() -> DataError:
    return DataError(
        "A process that reads media exited unexpectedly. Often the machine ran out of memory: lower --workers. If "
        "anymal itself crashes with --workers=0, a file in this batch crashes the library that decodes it."
    )


def _start(ahead: weakref.ref[ReadAhead[Any]]) -> None:
    # Turns off torch's threads, which a forked process does not have, before the first operation.
    start_worker(0)
    # torch's own pickling takes a file descriptor and shared memory per tensor; containers have little shared memory.
    ForkingPickler.register(torch.Tensor, _as_array)
    reader = ahead()
    assert reader is not None, "it waits until this process is forked"
    _READ.append(reader._read)


def _read_here(groups: Sequence[Sequence[Prompt]]) -> list[Any]:
    """What was read of each group, or the error."""
    [read] = _READ
    results: list[Any] = []
    for group in groups:
        try:
            results.append(read(group))
        except Exception as error:
            # A traceback is not sent along.
            error.add_note(f"In a reading process:\n{traceback.format_exc()}")
            results.append(error)
    return results


def _as_array(tensor: torch.Tensor) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    # numpy has no bfloat16.
    values = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return _from_array, (values.numpy(), tensor.dtype)


def _from_array(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(values).view(dtype)


def _key(group: Sequence[Prompt]) -> tuple[int, ...]:
    return tuple(map(id, group))
