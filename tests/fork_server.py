"""Start test processes as forks of a single-threaded server that has already imported everything.

Tests pay for the imports once, and the process that runs the tests, which may have threads, is never forked.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from typing import Any

import forks

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fork_server_imports"])

# Libraries that start threads when they are imported: OpenBLAS's pool, pyarrow's jemalloc.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


def start(target: Callable[..., None], *args: Any) -> Any:
    """Start a process that calls `target(*args)` with this process's environment, working directory and output.

    Args:
        target: an importable function; the new process does not see changes that this one made to modules.
    """
    given = (dict(os.environ), os.getcwd(), _Descriptor(1), _Descriptor(2), target, args)
    process = CONTEXT.Process(target=_begin, args=given)
    with _environment(ONE_THREAD):
        process.start()
    return process


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the server process, which starts together with the first child."""
    before = dict(os.environ)
    os.environ.update(more, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Descriptor:
    """A file descriptor of this process to hand to the child."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._number),)


def _received(descriptor: Any) -> int:
    return int(descriptor.detach())


def _begin(
    environment: dict[str, str], folder: str, out: int, err: int, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    for stream, number in ((1, out), (2, err)):
        os.dup2(number, stream)
        os.close(number)
    if "fork_server_imports" not in sys.modules:
        raise RuntimeError("the fork server could not import what tests need: see tests/fork_server_imports.py")
    if unsafe := forks.unsafe():
        raise RuntimeError(f"the fork server must have one thread when it forks: {unsafe[0]}")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    target(*args)
