"""Signs of life: what a rank is doing, in 128 bytes of shared memory that a monitor on the same machine reads.

Without the environment variable ANYMAL_HEARTBEATS (a folder, set by the launcher) nothing is written, and a beat costs
one comparison. Besides its beats, a thread notes twice a second that it runs: it stands still where the process is
stopped or where something holds Python's global lock.
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
# Magic, process, rank, step, phase, settled, progress, the last beat, the thread's last beat.
_FORMAT = struct.Struct("<8sIIqIIqqq")
_ALIVE = struct.Struct("<q")
_ALIVE_PLACE = _FORMAT.size - _ALIVE.size
# All but the thread's own field, which only the thread writes.
_BODY = struct.Struct("<8sIIqIIqq")


class Phase(IntEnum):
    """What a rank is doing."""

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
    """What a rank said last."""

    pid: int
    rank: int
    # The step under way, counted from 1 as in the log; -1 before the first.
    step: int
    phase: Phase
    # It has finished a step since it started.
    settled: bool
    # Grows with every beat.
    progress: int
    # time.monotonic_ns() of the main thread's last beat, and of the thread's.
    beat_ns: int
    alive_ns: int


class Heartbeat:
    """A rank's file of beats.

    Args:
        path: made anew; it is never seen in part.
    """

    def __init__(self, path: Path, rank: int) -> None:
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_bytes(bytes(SIZE))
        with part.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)
        self._pid, self._rank = os.getpid(), rank
        self._step, self._phase, self._settled, self._progress = -1, Phase.START, False, 0
        self._note_alive()
        self.beat(Phase.START)
        part.rename(path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self, phase: Optional[Phase] = None, step: Optional[int] = None, *, settled: bool = False) -> None:
        """Say that there is progress; what is not given stays."""
        self._phase = self._phase if phase is None else phase
        self._step = self._step if step is None else step
        self._settled = self._settled or settled
        self._progress += 1
        # Packed apart and copied at once: pack_into clears the place first, and a monitor that looked just then saw a
        # rank whose last beat was at time 0. Fields lie at multiples of their sizes, so that each is seen old or new.
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
        """End the thread; the file stays as it is."""
        self._stop.set()
        self._thread.join()
        self._map.close()

    def _run(self) -> None:
        while not self._stop.wait(ALIVE_EVERY):
            self._note_alive()

    def _note_alive(self) -> None:
        self._map[_ALIVE_PLACE : _FORMAT.size] = _ALIVE.pack(time.monotonic_ns())


def read(path: Path) -> Optional[Beat]:
    """A rank's last beat; None where there is none (yet)."""
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
    """As `Heartbeat.beat`, for this process's; nothing where it has none."""
    if _current is not None:
        _current.beat(phase, step, settled=settled)


@contextmanager
def publish(run_dir: Path) -> Iterator[None]:
    """Let this rank beat while the block runs, and write all threads' stacks to RUN/stacks/ at a SIGUSR2.

    An orderly end leaves the phase END.
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
        # It works in C: also while the main thread holds Python's lock.
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True, chain=False)
        try:
            yield
        finally:
            # From here on a late signal must not end the process.
            faulthandler.unregister(signal.SIGUSR2)
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if not path.stat().st_size:
        path.unlink()
