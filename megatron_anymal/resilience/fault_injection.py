"""Faults on purpose, to rehearse what a run does about them: `resilience.faults=["kill:rank=1,step=7"]`.

A fault is KIND:KEY=VALUE,KEY=VALUE,...

  kill, exception, stop      end by SIGKILL, raise, be stopped (SIGSTOP)          keys: rank step place write every
  hang, gil, slow            sleep; hold Python's global lock; go on after a while  and seconds
  nan                        not a number in this rank's gradient                  keys: rank step every
  enospc, eio                the disk is full, or fails, at a write of a save      keys: rank step write every
  corrupt                    a byte of the newest checkpoint changes               keys: rank step place every
  loader_hang, loader_kill   a loader process hangs or is killed                   keys: rank step worker every

rank: 0 unless given. place: start, data, compute, update, validation or checkpoint (in the thread that writes one);
compute unless given. step: the one under way, counted from 1; without it the first time the place is reached. write: at
which chunk of a checkpoint, from 1. seconds: for ever unless given, for slow they must be. Each fault happens once per
run folder, and leaves a mark in RUN/faults/; with every=1 each time that it is reached.
"""

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
from typing import Any, Optional

from megatron_anymal.config import AnyMALConfig, ConfigError

PLACES = ("start", "data", "compute", "update", "validation", "checkpoint")
_ANYWHERE = ("rank", "step", "place", "write", "every")
_LASTING = (*_ANYWHERE, "seconds")
_WRITING = ("rank", "step", "write", "every")
_LOADING = ("rank", "step", "worker", "every")
# Kind -> the keys it has.
KINDS: dict[str, tuple[str, ...]] = {
    "kill": _ANYWHERE,
    "exception": _ANYWHERE,
    "stop": _ANYWHERE,
    "hang": _LASTING,
    "gil": _LASTING,
    "slow": _LASTING,
    "nan": ("rank", "step", "every"),
    "enospc": _WRITING,
    "eio": _WRITING,
    "corrupt": ("rank", "step", "place", "every"),
    "loader_hang": _LOADING,
    "loader_kill": _LOADING,
}
# Kinds that do not happen in `at`.
_ELSEWHERE = ("nan", "loader_hang", "loader_kill")
_SEVERAL_YEARS = 1e8


class InjectedFault(RuntimeError):
    """What the kind `exception` raises."""


@dataclass(frozen=True)
class Fault:
    """One entry of resilience.faults."""

    text: str
    kind: str
    rank: int = 0
    # 0: any.
    step: int = 0
    place: str = "compute"
    write: int = 1
    worker: int = 0
    every: int = 0
    seconds: float = _SEVERAL_YEARS


def parse(text: str) -> Fault:
    """Read an entry.

    Raises:
        ConfigError: an unknown kind or key, or a value that makes no sense; names it.
    """
    kind, _, rest = text.partition(":")
    where = f"resilience.faults: {text!r}"
    if kind not in KINDS:
        raise ConfigError(f"{where}: unknown kind {kind!r}. Known: {', '.join(KINDS)}.")
    values: dict[str, Any] = {}
    for entry in filter(None, rest.split(",")):
        key, equals, value = entry.partition("=")
        if key not in KINDS[kind] or not equals:
            raise ConfigError(f"{where}: {kind!r} has no key {key!r}. It has: {', '.join(KINDS[kind])}, as KEY=VALUE.")
        if key in values:
            raise ConfigError(f"{where}: {key!r} is given twice.")
        values[key] = _value(key, value, where)
    if kind == "slow" and "seconds" not in values:
        raise ConfigError(f"{where}: 'slow' needs seconds=NUMBER.")
    if kind in ("enospc", "eio"):
        values["place"] = "checkpoint"
    if "step" in values and values.get("place") == "start":
        raise ConfigError(f"{where}: 'step' has no effect with place=start, which comes before all steps.")
    if "write" in values and values.get("place") != "checkpoint":
        raise ConfigError(f"{where}: 'write' has no effect without place=checkpoint.")
    return Fault(text, kind, **values)


def _value(key: str, value: str, where: str) -> Any:
    if key == "place":
        if value not in PLACES:
            raise ConfigError(f"{where}: place={value!r} is not one of {', '.join(PLACES)}.")
        return value
    kind: Callable[[str], Any] = float if key == "seconds" else int
    try:
        number = kind(value)
    except ValueError:
        raise ConfigError(f"{where}: {key}={value!r} is not a number.") from None
    if not number >= (1 if key in ("step", "write") else 0) or number > _SEVERAL_YEARS:
        raise ConfigError(f"{where}: {key}={value} is out of range.")
    return number


def check(config: AnyMALConfig) -> None:
    """Refuse faults that cannot happen.

    Raises:
        ConfigError: naming the entry and the mend.
    """
    for fault in map(parse, config.resilience.faults):
        where = f"resilience.faults: {fault.text!r}"
        if fault.rank >= config.world_size:
            raise ConfigError(f"{where}: there is no rank {fault.rank} among {config.world_size} process(es).")
        if fault.kind.startswith("loader_") and fault.worker >= config.data.num_workers:
            raise ConfigError(
                f"{where}: a rank has data.num_workers={config.data.num_workers} loader process(es), counted from 0. "
                "Raise it, or name another worker."
            )


@dataclass
class _Armed:
    """This rank's faults, and where their marks are kept."""

    faults: tuple[Fault, ...] = ()
    run_dir: Path = Path()
    # How often each fault's place was reached in a step: (number, step) -> times.
    reached: Optional[dict[tuple[int, int], int]] = None


_armed = _Armed()


def arm(entries: Sequence[str], rank: int, run_dir: Path) -> None:
    """Take up this rank's faults; those of before are forgotten."""
    global _armed
    _armed = _Armed(tuple(f for f in map(parse, entries) if f.rank == rank), run_dir, {})


def at(place: str, step: int) -> None:
    """Let happen what is to happen here. Once a chunk for the place `checkpoint`."""
    for fault in _armed.faults:
        here = fault.place == place and fault.kind not in _ELSEWHERE
        if here and _counted(fault, step) and _due(fault, step):
            _ACTIONS[fault.kind](fault)


def spoils_gradient(step: int) -> bool:
    """Whether this rank's gradient is to become not a number."""
    return any(fault.kind == "nan" and _due(fault, step) for fault in _armed.faults)


def in_loader(worker: int, planned: int) -> None:
    """As `at`, in a loader process that begins to read for a step of the plan, which counts from 0."""
    for fault in _armed.faults:
        if fault.kind.startswith("loader_") and fault.worker == worker and _due(fault, planned + 1):
            _ACTIONS[fault.kind.removeprefix("loader_")](fault)


def _counted(fault: Fault, step: int) -> bool:
    """Whether this is the write that the fault names."""
    if fault.place != "checkpoint":
        return True
    assert _armed.reached is not None
    key = (id(fault), step)
    _armed.reached[key] = _armed.reached.get(key, 0) + 1
    return _armed.reached[key] == fault.write


def _due(fault: Fault, step: int) -> bool:
    if fault.step not in (0, step):
        return False
    if fault.every:
        return True
    mark = _armed.run_dir / "faults" / re.sub(r"[^\w.=,-]", "_", fault.text)
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
    raise InjectedFault(f"asked for by resilience.faults: {fault.text}")


def _stop(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _sleep(fault: Fault) -> None:
    time.sleep(fault.seconds)


class _Time(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def _hold_gil(fault: Fault) -> None:
    """Wait in C for a mutex that this thread holds itself: unlike a sleep, no signal ends that."""
    # PyDLL, unlike CDLL, keeps the lock during a call.
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
    folders: Iterable[Path] = (_armed.run_dir / "checkpoints").glob("step_*")
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
