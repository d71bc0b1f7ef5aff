"""Child processes that must not outlive their parent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

# Linux prctl option PR_SET_PDEATHSIG: the signal that a process receives when its parent ends.
_SET_PARENT_DEATH_SIGNAL = 1


def end_with_parent() -> None:
    """Have the calling multiprocessing child killed when its parent ends for any reason, or now if it already has.

    Does nothing on systems other than Linux.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)
