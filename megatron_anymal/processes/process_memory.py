"""Host memory of the calling process."""

from __future__ import annotations

import os
from pathlib import Path

GIB = 2**30
_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Memory that the calling process holds in RAM, in bytes, without pages of files and shared memory.

    Pages of files, such as those of an index, are the kernel's to take back, and micro-batches in shared memory belong
    to whoever reads them. After a fork, pages that are still shared with the parent count in both processes: the sum
    over processes is not what they take together, but the growth since the fork is the process's own. The proportional
    set size, which would divide shared pages, falls and rises with what other processes do, and takes the kernel
    milliseconds per GiB instead of microseconds. On systems other than Linux, all resident memory.
    """
    if not _STATM.exists():
        import psutil

        return int(psutil.Process().memory_info().rss)
    _, resident, of_files, *_ = map(int, _STATM.read_text().split())
    return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """Peak of the calling process's resident memory since its program started, in bytes. Linux only.

    Not getrusage's ru_maxrss: the kernel carries that over an exec, so a child reports at least what its parent held.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
