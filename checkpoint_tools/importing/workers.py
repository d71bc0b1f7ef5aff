"""Worker processes that share a list of jobs and end with their parent."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Sequence
from typing import Any

from megatron_anymal.processes.child_processes import end_with_parent
from megatron_anymal.processes.process_memory import peak_resident_bytes


class WorkerError(Exception):
    """A worker failed; the message is one line for the user."""


def run_workers(
    processes: int,
    jobs: Sequence[Any],
    work: Callable[[Any, Callable[[int], None]], None],
    advance: Callable[[int], None],
) -> list[int]:
    """Run all jobs on forked worker processes.

    Args:
        processes: maximum number of workers; never more than jobs are started.
        work: runs one job; its second argument is a progress callback.
        advance: called with the progress of all workers.

    Returns:
        For each worker, its peak memory beyond its memory at start, in bytes.

    Raises:
        WorkerError, OSError: a job failed; the others are stopped.
    """
    context = multiprocessing.get_context("fork")
    todo: Any = context.SimpleQueue()
    reports: Any = context.Queue()
    for job in [*jobs, *[None] * processes]:
        todo.put(job)
    workers = [
        context.Process(target=_work, args=(todo, reports, work), daemon=True) for _ in range(min(processes, len(jobs)))
    ]
    for worker in workers:
        worker.start()
    peaks: list[int] = []
    try:
        while len(peaks) < len(workers):
            try:
                kind, value = reports.get(timeout=0.5)
            except queue.Empty:
                _check_alive(workers, len(peaks))
                continue
            if kind == "failed":
                raise WorkerError(value)
            if kind == "disk":
                raise OSError(*value)
            if kind == "done":
                advance(value)
            else:
                peaks.append(value)
    finally:
        for worker in workers:
            if len(peaks) < len(workers):
                worker.kill()
            worker.join()
    return peaks


def _check_alive(workers: Sequence[Any], finished: int) -> None:
    killed = [worker.exitcode for worker in workers if worker.exitcode]
    if killed:
        reason = f"signal {-killed[0]}" if killed[0] < 0 else f"exit code {killed[0]}"
        raise WorkerError(f"a worker process ended with {reason} (out of memory?). Run the command again to resume.")


def _work(todo: Any, messages: Any, work: Callable[[Any, Callable[[int], None]], None]) -> None:
    end_with_parent()
    before = peak_resident_bytes()
    try:
        while (job := todo.get()) is not None:
            work(job, lambda count: messages.put(("done", count)))
        messages.put(("peak", peak_resident_bytes() - before))
    except OSError as error:
        # An OSError without an errno carries a library's own message.
        messages.put(("disk", (error.errno, error.strerror, error.filename)) if error.errno else ("failed", str(error)))
    except ValueError as error:
        # The package's own errors derive from ValueError; each message is one line for the user.
        messages.put(("failed", str(error)))
    except BaseException as error:
        messages.put(("failed", f"{type(error).__name__}: {error}"))
