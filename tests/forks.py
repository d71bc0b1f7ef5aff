"""Detect forks of a process that has threads.

The child gets a single thread and copies of locks that other threads held, which are never released: if the parent has
a pool of OpenMP threads, the child's first parallel tensor operation waits forever. Whether this happens depends on the
operations that ran before, so a test passes alone and hangs after another one. Only `os.fork` is detected; processes
started by exec are safe.
"""

from __future__ import annotations

import os
import traceback

# Code that may fork while other threads run: the end of the file's path, the function, and why it is safe.
ALLOWED = {
    ("torch/utils/data/dataloader.py", "__init__"): "a loader worker turns threads off before its first tensor "
    "operation (torch's _worker_loop) and takes no lock that a thread of a run holds: DECISIONS.md",
    ("generation/read_ahead.py", "_submit"): "a process that reads ahead turns torch's threads off before its first "
    "tensor operation, as a loader worker does; all are forked at once, before the pool starts its thread",
    ("checkpoint_tools/importing/workers.py", "run_workers"): "import_llama turns torch's threads off first, which the "
    "workers inherit; they move bytes between files, and OpenBLAS's threads end before a fork by its own handler",
    ("dist_checkpointing/strategies/filesystem_async.py", "write_preloaded_data_multiproc"): "megatron-core's writer, "
    "which no run uses; it is here the oracle of tests, and its children only write bytes to files",
    ("tests/faults/test_checkpoint_kill.py", "forked"): "the child writes files of a copied state, without collectives "
    "and with one torch thread, and is killed",
}

_found: list[str] = []


def watch() -> None:
    """From now on, record forks of this process (and of processes forked from it) while it has other threads."""
    os.register_at_fork(before=_look)


def unsafe() -> list[str]:
    """Forks beside other threads since the last call, each with its stack trace."""
    forks = _found[:]
    _found.clear()
    return forks


def _look() -> None:
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads == 1:
        return
    stack = traceback.extract_stack()[:-1]
    for file, function in ALLOWED:
        if any(frame.filename.endswith(file) and frame.name == function for frame in stack):
            return
    _found.append(f"a process with {threads} threads was forked:\n{''.join(traceback.format_list(stack[-8:]))}")
