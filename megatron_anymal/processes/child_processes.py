"""Child processes: make sure that none outlives its parent, find and end them, and count the cores for them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Optional

# Linux prctl option PR_SET_PDEATHSIG: the signal that a process receives when its parent ends.
_SET_PARENT_DEATH_SIGNAL = 1
# Signals that ask a process to stop or to write its state. A scheduler may send them to every process of a job.
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def end_with_parent() -> None:
    """Have the calling multiprocessing child killed when its parent ends for any reason, or now if it already has.

    Does nothing on systems other than Linux.
    """
    parent = multiprocessing.parent_process()
    end_with(os.getppid() if parent is None or parent.pid is None else parent.pid)


def end_with(parent: int) -> None:
    """Have the calling process killed when its parent, of this process ID, ends, or now if it already has.

    Does nothing on systems other than Linux.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def share_of_cores() -> int:
    """Cores that this process may use, shared with the other ranks of its node; at least 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def leave_stop_signals() -> dict[int, Any]:
    """Have the calling process ignore signals that its launcher handles for it; return the handlers until now.

    A handler that does nothing, unlike SIG_IGN, is not inherited by commands that the process starts.
    """
    return {number: signal.signal(number, _leave_it) for number in _STOPPING}


def _leave_it(number: int, frame: Optional[FrameType]) -> None:
    """Do nothing."""


def children(pid: int) -> list[int]:
    """Child processes of a process; avoids scanning all processes of the machine if the kernel lists the children."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        # A thread ended in the meantime.
        lists = []
    if lists:
        return [int(child) for listed in lists for child in listed.split()]
    import psutil

    with suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def end_group(pid: int) -> None:
    """Kill a process and its child processes; it leads a process group."""
    for end in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)
