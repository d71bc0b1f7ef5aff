"""Fault injection, to rehearse recovery from failures: `resilience.faults` (config/fault_grammar.py)."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megatron_anymal.config.fault_grammar import Fault, parse

# Kinds that are not triggered by `inject`.
_ELSEWHERE = ("nan", "loader_hang", "loader_kill")


class InjectedFault(RuntimeError):
    """Raised by faults of kind `exception`."""


@dataclass
class _Scheduled:
    """This rank's faults, and the run folder in which they leave marks."""

    faults: tuple[Fault, ...] = ()
    run_dir: Path = Path()
    # How often each fault's injection point was reached in a step: (id of the fault, step) -> count.
    reached: Optional[dict[tuple[int, int], int]] = None


_scheduled = _Scheduled()


def schedule(entries: Sequence[str], rank: int, run_dir: Path) -> None:
    """Schedule this rank's faults, replacing those scheduled earlier."""
    global _scheduled
    _scheduled = _Scheduled(tuple(f for f in map(parse, entries) if f.rank == rank), run_dir, {})


def inject(place: str, step: int) -> None:
    """Trigger any fault scheduled at this point of a step; `checkpoint` is reached once per written chunk."""
    for fault in _scheduled.faults:
        matches = fault.place == place and fault.kind not in _ELSEWHERE
        if matches and _counted(fault, step) and _due(fault, step):
            _ACTIONS[fault.kind](fault)


def spoils_gradient(step: int) -> bool:
    """Whether this rank's gradient is to be set to NaN."""
    return any(fault.kind == "nan" and _due(fault, step) for fault in _scheduled.faults)


def in_loader(worker: int, planned: int) -> None:
    """As `inject`, in a loader process that starts to read a step of the plan; `planned` counts from 0."""
    for fault in _scheduled.faults:
        if fault.kind.startswith("loader_") and fault.worker == worker and _due(fault, planned + 1):
            _ACTIONS[fault.kind.removeprefix("loader_")](fault)


def _counted(fault: Fault, step: int) -> bool:
    """Whether this is the write at which the fault is scheduled."""
    if fault.place != "checkpoint":
        return True
    assert _scheduled.reached is not None
    key = (id(fault), step)
    _scheduled.reached[key] = _scheduled.reached.get(key, 0) + 1
    return _scheduled.reached[key] == fault.write


def _due(fault: Fault, step: int) -> bool:
    if fault.step not in (0, step):
        return False
    if fault.every:
        return True
    mark = _scheduled.run_dir / "faults" / re.sub(r"[^\w.=,-]", "_", fault.text)
    mark.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.fsync(descriptor)
    os.close(descriptor)
    return True


def _kill(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(fault: Fault) -> None:
    raise InjectedFault(f"injected by resilience.faults: {fault.text}")


def _stop(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _sleep(fault: Fault) -> None:
    time.sleep(fault.seconds)


class _Time(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def _hold_gil(fault: Fault) -> None:
    """Wait in C for a mutex that this thread already holds; unlike a sleep, no signal interrupts this."""
    # PyDLL, unlike CDLL, keeps the GIL during a call.
    c = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(128)
    c.pthread_mutex_lock(mutex)
    until = _Time(int(time.time() + fault.seconds), int(fault.seconds % 1 * 1e9))
    c.pthread_mutex_timedlock(mutex, ctypes.byref(until))


def _disk_full(fault: Fault) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _disk_fails(fault: Fault) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _corrupt(fault: Fault) -> None:
    folders: Iterable[Path] = (_scheduled.run_dir / "checkpoints").glob("step_*")
    newest = max(folders, default=None)
    if newest is None:
        return
    path = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


_ACTIONS: dict[str, Callable[[Fault], None]] = {
    "kill": _kill,
    "exception": _raise,
    "stop": _stop,
    "hang": _sleep,
    "gil": _hold_gil,
    "slow": _sleep,
    "enospc": _disk_full,
    "eio": _disk_fails,
    "corrupt": _corrupt,
}
