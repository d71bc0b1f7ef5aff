"""Threads for requests. Unlike those of `concurrent.futures`, they do not keep a process from ending."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Optional, TypeVar

_T = TypeVar("_T")
_Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class DaemonPool:
    """Runs functions in a number of daemon threads, in the order of submission. The threads end with the pool."""

    def __init__(self, threads: int):
        self._jobs: SimpleQueue[Optional[_Job]] = SimpleQueue()
        for _ in range(threads):
            # The threads hold the queue, not the pool, which can therefore be freed.
            threading.Thread(target=_work, args=(self._jobs,), daemon=True, name="object-storage").start()
        weakref.finalize(self, _end, self._jobs, threads).atexit = False

    def submit(self, function: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Run a function as soon as a thread is free. The future holds its result or its exception."""
        future: Future[_T] = Future()
        self._jobs.put((future, function, arguments))
        return future


def _work(jobs: SimpleQueue[Optional[_Job]]) -> None:
    while (job := jobs.get()) is not None:
        future, function, arguments = job
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        # A thread that waits for its next job must not keep the bytes of the last one.
        del job, future, function, arguments


def _end(jobs: SimpleQueue[Optional[_Job]], threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)
