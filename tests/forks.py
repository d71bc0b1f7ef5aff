"""Notices a process with threads being forked.

A child gets one thread and copies of the locks that the others held, which nobody opens: with a pool of OpenMP threads
in the parent, the child's first parallel tensor operation waits for ever. It depends on which operations ran before, so
a test passes alone and hangs behind another one. Only `os.fork` is seen; what is started by exec is safe.
"""

from __future__ import annotations

import os
import traceback

# Whoever forks beside threads all the same: the file as it ends, the function, and why it is safe.
ALLOWED = {
    ("torch/utils/data/dataloader.py", "__init__"): "a loader worker turns threads off before its first tensor "
    "operation (torch's _worker_loop) and takes no lock that a thread of a run holds: DECISIONS.md",
    ("checkpoint_tools/importing/workers.py", "run_workers"): "import_llama turns torch's threads off first, which the "
    "workers inherit; they move bytes between files, and OpenBLAS's threads end before a fork by its own handler",
    ("dist_checkpointing/strategies/filesystem_async.py", "write_preloaded_data_multiproc"): "megatron-core's writer, "
    "which no run uses; it is here the oracle of tests, and its children only write bytes to files",
    ("tests/faults/test_checkpoint_kill.py", "forked"): "the child writes files of a copied state, without collectives "
    "and with one torch thread, and is killed",
}

_found: list[str] = []


def watch() -> None:
    """From now on note forks of this process, and of those forked from it, while it has other threads."""
    os.register_at_fork(before=_look)


def unsafe() -> list[str]:
    """What forked beside threads since the last call, each with the lines that led there."""
    found = _found[:]
    _found.clear()
    return found


def _look() -> None:
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads == 1:
        return
    stack = traceback.extract_stack()[:-1]
    for file, function in ALLOWED:
        if any(frame.filename.endswith(file) and frame.name == function for frame in stack):
            return
    _found.append(f"a process with {threads} threads was forked:\n{''.join(traceback.format_list(stack[-8:]))}")
