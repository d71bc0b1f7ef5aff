"""Heartbeats: a rank's phase and step, in 128 bytes of shared memory read by a monitor on the same machine.

Without the environment variable ANYMAL_HEARTBEATS (a folder, set by the launcher) nothing is written, and a beat costs
one comparison. In addition, a background thread writes the time twice per second; it stalls while the process is
stopped or something holds the GIL.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Optional

ENVIRONMENT = "ANYMAL_HEARTBEATS"
SIZE = 128
ALIVE_EVERY = 0.5
_MAGIC = b"anymal1\0"
# Magic, process ID, rank, step, phase, settled, progress, time of the last beat, time of the thread's last beat.
_FORMAT = struct.Struct("<8sIIqIIqqq")
_ALIVE = struct.Struct("<q")
_ALIVE_OFFSET = _FORMAT.size - _ALIVE.size
# Everything except the thread's field, which only the thread writes.
_BODY = struct.Struct("<8sIIqIIqq")


class Phase(IntEnum):
    """Current activity of a rank."""

    START = 0
    DATA = 1
    COMPUTE = 2
    UPDATE = 3
    VALIDATION = 4
    CHECKPOINT = 5
    LOADING = 6
    END = 7


@dataclass(frozen=True)
class Beat:
    """Last heartbeat of a rank."""

    # Process ID.
    pid: int
    # Rank in the job.
    rank: int
    # Step in progress, counted from 1 as in the log; -1 before the first step.
    step: int
    # What the rank is doing.
    phase: Phase
    # The rank has finished a step since it started.
    settled: bool
    # Incremented with every beat.
    progress: int
    # time.monotonic_ns() of the last beat of the main thread.
    beat_ns: int
    # time.monotonic_ns() of the last beat of the background thread.
    alive_ns: int


class Heartbeat:
    """Heartbeat file of a rank.

    Args:
        path: the file; created atomically, replacing an existing one.
    """

    def __init__(self, path: Path, rank: int) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(bytes(SIZE))
        with temporary.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)
        self._pid, self._rank = os.getpid(), rank
        self._step, self._phase, self._settled, self._progress = -1, Phase.START, False, 0
        self._note_alive()
        self.beat(Phase.START)
        temporary.rename(path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self, phase: Optional[Phase] = None, step: Optional[int] = None, *, settled: bool = False) -> None:
        """Report progress; arguments that are not given keep their last value."""
        self._phase = self._phase if phase is None else phase
        self._step = self._step if step is None else step
        self._settled = self._settled or settled
        self._progress += 1
        # Pack first, then copy at once: pack_into zeroes its target first, so a monitor could read a last beat at
        # time 0. Fields are aligned to their size, so a reader sees each one either old or new.
        self._map[: _BODY.size] = _BODY.pack(
            _MAGIC,
            self._pid,
            self._rank,
            self._step,
            self._phase,
            self._settled,
            self._progress,
            time.monotonic_ns(),
        )

    def close(self) -> None:
        """Stop the thread; the file keeps its content."""
        self._stop.set()
        self._thread.join()
        self._map.close()

    def _run(self) -> None:
        while not self._stop.wait(ALIVE_EVERY):
            self._note_alive()

    def _note_alive(self) -> None:
        self._map[_ALIVE_OFFSET : _FORMAT.size] = _ALIVE.pack(time.monotonic_ns())


def read(path: Path) -> Optional[Beat]:
    """Last beat of a rank; None if there is none (yet)."""
    try:
        data = path.read_bytes()
        magic, pid, rank, step, phase, settled, progress, beat_ns, alive_ns = _FORMAT.unpack_from(data)
        if magic != _MAGIC:
            return None
        return Beat(pid, rank, step, Phase(phase), bool(settled), progress, beat_ns, alive_ns)
    except (OSError, struct.error, ValueError):
        return None


_current: Optional[Heartbeat] = None


def beat(phase: Optional[Phase] = None, step: Optional[int] = None, *, settled: bool = False) -> None:
    """As `Heartbeat.beat`, for this process's heartbeat; does nothing if it has none."""
    if _current is not None:
        _current.beat(phase, step, settled=settled)


@contextmanager
def publish(run_dir: Path) -> Iterator[None]:
    """Publish this rank's heartbeat while the block runs, and dump all threads' stacks to RUN/stacks/ on SIGUSR2.

    The phase is set to END if the block ends without an exception.
    """
    global _current
    rank, folder = int(os.environ.get("RANK", "0")), os.environ.get(ENVIRONMENT)
    _current = Heartbeat(Path(folder) / f"rank_{rank:05d}", rank) if folder else None
    stacks = run_dir / "stacks" / f"rank_{rank:05d}_{os.getpid()}.txt"
    try:
        with _stacks_at_signal(stacks):
            yield
        beat(Phase.END)
    finally:
        if _current is not None:
            _current.close()
        _current = None


@contextmanager
def _stacks_at_signal(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        # The handler runs in C, so it also works while the main thread holds the GIL.
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True, chain=False)
        try:
            yield
        finally:
            # From here on, a late signal must not end the process.
            faulthandler.unregister(signal.SIGUSR2)
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if not path.stat().st_size:
        path.unlink()
