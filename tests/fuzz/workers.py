"""Run cases in worker processes. Hangs and excessive memory use are detected, and lost workers are replaced."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Optional

HANG_SECONDS = 10.0
MEMORY_BYTES = 512 * 2**20
# Timeout of the first case, which includes imports and the creation of the corpus.
_START_SECONDS = 300.0
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Result:
    """Outcome of one case."""

    seed: int
    number: int
    label: str
    # "read", "named" or "refused"; or "silent: ...", "traceback: ...", "hang", "memory: ..." or "died: ...".
    outcome: str

    @property
    def kind(self) -> str:
        """First word of the outcome."""
        return self.outcome.partition(":")[0]

    @property
    def failed(self) -> bool:
        """Whether the outcome is a failure."""
        return self.kind not in ("read", "named", "refused")


class _Worker:
    """One worker process."""

    def __init__(self, folder: Path, tokenizer: str, checkpoint: Optional[Path]):
        self._arguments = (folder, tokenizer, checkpoint)
        self.connection: Connection
        self.job: Optional[tuple[int, int]] = None
        self._process: Any = None
        self._started = 0
        self.start()

    def start(self) -> None:
        """Start a new process, and stop the old one if there is one."""
        self.stop()
        self.connection, other = _CONTEXT.Pipe()
        folder, tokenizer, checkpoint = self._arguments
        folder = folder / str(self._started)
        self._started += 1
        self._process = _CONTEXT.Process(target=_serve, args=(other, folder, tokenizer, checkpoint), daemon=True)
        self._process.start()
        other.close()
        self._ready = False

    def give(self, job: tuple[int, int]) -> None:
        """Send a case's seed and number to the process."""
        self.job = job
        self.deadline = time.monotonic() + (HANG_SECONDS if self._ready else _START_SECONDS)
        self.connection.send(job)

    def take(self) -> Result:
        """Receive the result. A process that has died is replaced."""
        assert self.job is not None
        try:
            label, outcome = self.connection.recv()
            self._ready = True
        except EOFError:
            self._process.join()
            label, outcome = "?", f"died: exit code {self._process.exitcode}"
            self.start()
        return Result(*self.job, label, outcome)

    def give_up(self) -> Result:
        """Replace a process that exceeded its deadline."""
        assert self.job is not None
        self.start()
        return Result(*self.job, "?", "hang")

    def stop(self) -> None:
        """Kill the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def run_cases(
    jobs: Sequence[tuple[int, int]], folder: Path, tokenizer: str, checkpoint: Optional[Path], workers: int
) -> Iterator[Result]:
    """Run cases, given as (seed, number), on several processes, in no particular order."""
    waiting = list(reversed(jobs))
    pool = [_Worker(folder / f"worker{n}", tokenizer, checkpoint) for n in range(min(workers, len(jobs)))]
    busy = list(pool)
    for worker in pool:
        worker.give(waiting.pop())
    try:
        while busy:
            answered = wait([worker.connection for worker in busy], timeout=0.5)
            for worker in list(busy):
                if worker.connection in answered:
                    yield worker.take()
                elif time.monotonic() > worker.deadline:
                    yield worker.give_up()
                else:
                    continue
                if waiting:
                    worker.give(waiting.pop())
                else:
                    busy.remove(worker)
    finally:
        for worker in pool:
            worker.stop()


def _serve(connection: Connection, folder: Path, tokenizer: str, checkpoint: Optional[Path]) -> None:
    import logging
    import warnings

    import torch

    from fuzz.targets import Targets, outcome

    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    targets = Targets(folder, tokenizer, checkpoint)
    while True:
        seed, number = connection.recv()
        case = targets.case(seed, number)
        before = _memory("VmRSS")
        # Reset the peak of the resident set size (VmHWM).
        Path("/proc/self/clear_refs").write_text("5")
        verdict = outcome(case)
        grown = _memory("VmHWM") - before
        if grown > MEMORY_BYTES and not verdict.startswith(("silent", "traceback")):
            verdict = f"memory: {grown >> 20} MiB"
        connection.send((case.label, verdict))


def _memory(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
