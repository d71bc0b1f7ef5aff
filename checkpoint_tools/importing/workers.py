"""Work shared out over processes that die with the one that started them."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Sequence
from typing import Any

from checkpoint_tools.memory import peak_memory
from megatron_anymal.child_processes import end_with_parent


class WorkerError(Exception):
    """A worker failed; the message is one line for the user."""


def run_workers(
    processes: int,
    jobs: Sequence[Any],
    work: Callable[[Any, Callable[[int], None]], None],
    advance: Callable[[int], None],
) -> list[int]:
    """Do all jobs, each on one of some forked processes.

    Args:
        processes: how many; never more than jobs.
        work: does one job; its second argument takes progress.
        advance: told the progress of all.

    Returns:
        Per process the most memory that it held beyond what it started with, in bytes.

    Raises:
        WorkerError, OSError: a job failed; the others are stopped.
    """
    context = multiprocessing.get_context("fork")
    todo: Any = context.SimpleQueue()
    told: Any = context.Queue()
    for job in [*jobs, *[None] * processes]:
        todo.put(job)
    workers = [
        context.Process(target=_work, args=(todo, told, work), daemon=True) for _ in range(min(processes, len(jobs)))
    ]
    for worker in workers:
        worker.start()
    peaks: list[int] = []
    try:
        while len(peaks) < len(workers):
            try:
                kind, value = told.get(timeout=0.5)
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
        raise WorkerError(f"a worker process ended by {reason} (out of memory?). Start again to go on.")


def _work(todo: Any, told: Any, work: Callable[[Any, Callable[[int], None]], None]) -> None:
    end_with_parent()
    before = peak_memory()
    try:
        while (job := todo.get()) is not None:
            work(job, lambda count: told.put(("done", count)))
        told.put(("peak", peak_memory() - before))
    except OSError as error:
        # Without a number it is a library's own message.
        told.put(("disk", (error.errno, error.strerror, error.filename)) if error.errno else ("failed", str(error)))
    except ValueError as error:
        # The package's own errors are of this kind, each a line for the user.
        told.put(("failed", str(error)))
    except BaseException as error:
        told.put(("failed", f"{type(error).__name__}: {error}"))
