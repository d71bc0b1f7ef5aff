"""Locks between the processes of a node. The kernel releases those of a process that ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the lock of a file, which is created if it does not exist. Threads of one process exclude each other, too.

    Yields:
        The descriptor of the open file.
    """
    # The folder of a cache may be emptied by those who clean up temporary files.
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def all_locked(paths: Iterable[Path]) -> Iterator[None]:
    """Hold the locks of several files. All processes take them in the same order, so that none waits for another."""
    with ExitStack() as stack:
        for path in sorted(set(paths)):
            stack.enter_context(locked(path))
        yield
