"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

# Linux's prctl: which signal a process gets when its parent ends.
_SET_PARENT_DEATH_SIGNAL = 1


def end_with_parent() -> None:
    """Called in a process of multiprocessing: from now on it is killed when its parent ends, however that ends; at once
    where it has ended already. On Linux; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)
