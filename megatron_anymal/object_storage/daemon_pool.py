"""Threads for requests. Unlike those of `concurrent.futures`, they do not keep a process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

_T = TypeVar("_T")


class DaemonPool:
    """Runs functions in a number of daemon threads, in the order of submission."""

    def __init__(self, threads: int):
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        for _ in range(threads):
            threading.Thread(target=self._run, daemon=True, name="object-storage").start()

    def submit(self, function: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Run a function as soon as a thread is free. The future holds its result or its exception."""
        future: Future[_T] = Future()
        self._jobs.put((future, function, arguments))
        return future

    def _run(self) -> None:
        while True:
            future, function, arguments = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            # A thread that waits for its next job must not keep the bytes of the last one.
            del future, function, arguments
