"""Simulate disk errors and power loss at a chosen write, sync, rename or deletion of a checkpoint.

`Disk` intercepts the engine's file operations below a folder. To simulate power loss, a forked process truncates or
removes everything that was written but not synced, and is then killed with SIGKILL.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import start_ranks


@dataclass(frozen=True)
class Operation:
    """One file operation."""

    number: int
    # write, fsync, rename, mkdir, unlink or rmdir.
    kind: str
    path: str


class Disk:
    """Intercept every change below `folder` in this process, and optionally make it fail.

    Args:
        meet: called before each operation; may raise an error or kill the process.
    """

    def __init__(self, folder: Path, meet: Callable[[Operation], None]) -> None:
        self.folder, self._meet = str(folder), meet
        self.seen: list[Operation] = []
        # Inodes with unsynced writes, and new names in unsynced folders.
        self._unsynced: set[int] = set()
        self._new: set[tuple[int, str]] = set()

    def install(self) -> None:
        """Start intercepting in this process."""
        real_fsync = os.fsync

        real_open = io.open

        def opened(file: Any, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
            if not self._watches(file, mode):
                return real_open(file, mode, *arguments, **settings)
            with self._noting_new(file):
                return _File(self, real_open(file, mode, *arguments, **settings), os.fspath(file))

        class RawFile(io.FileIO):
            def __init__(raw, file: Any, mode: str = "r", *arguments: Any, **settings: Any) -> None:
                raw.watched = self._watches(file, mode)
                with self._noting_new(file) if raw.watched else nullcontext():
                    super().__init__(file, mode, *arguments, **settings)

            def write(raw, data: Any) -> int:
                write = super().write
                return self._write(raw.fileno(), str(raw.name), data, write) if raw.watched else write(data)

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path.startswith(self.folder):
                self._before("fsync", path)
            real_fsync(descriptor)
            self._synced(os.fstat(descriptor).st_ino)

        builtins.open = io.open = opened  # type: ignore[assignment]
        io.FileIO = RawFile  # type: ignore[assignment, misc]
        os.fsync = fsync
        for name in ("rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._counted(name, getattr(os, name)))

    def lose_power(self) -> None:
        """Truncate or remove everything that was not synced: the worst case after a loss of power."""
        for parent, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(parent, name)
                if os.stat(path).st_ino in self._unsynced:
                    os.truncate(path, os.path.getsize(path) // 2)
        for parent, _, names in list(os.walk(self.folder)):
            for name in names:
                if (os.stat(parent).st_ino, name) in self._new:
                    os.remove(os.path.join(parent, name))

    def _counted(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **settings: Any) -> Any:
            # shutil.rmtree passes names relative to an open folder.
            inside = "dir_fd" in settings and settings["dir_fd"] is not None
            where = os.readlink(f"/proc/self/fd/{settings['dir_fd']}") if inside else ""
            full = os.path.join(where, os.fspath(path))
            if full.startswith(self.folder):
                self._before(kind, full)
            return real(path, *arguments, **settings)

        return call

    def _before(self, kind: str, path: str) -> None:
        operation = Operation(len(self.seen), kind, path)
        self.seen.append(operation)
        self._meet(operation)

    def _watches(self, file: Any, mode: str) -> bool:
        return not isinstance(file, int) and str(file).startswith(self.folder) and bool(set(mode) & set("wxa"))

    @contextmanager
    def _noting_new(self, path: Any) -> Iterator[None]:
        is_new = not os.path.exists(path)
        yield
        if is_new:
            self._new.add((os.stat(os.path.dirname(path)).st_ino, os.path.basename(path)))

    def _write(self, descriptor: int, path: str, data: Any, write: Callable[[Any], Any]) -> int:
        self._unsynced.add(os.fstat(descriptor).st_ino)
        try:
            self._before("write", path)
        except OSError:
            # A full disk still writes as much as fits.
            write(data[: len(data) // 2])
            raise
        return int(write(data))

    def _synced(self, inode: int) -> None:
        self._unsynced.discard(inode)
        self._new = {entry for entry in self._new if entry[0] != inode}


class _File:
    """A file whose writes are intercepted."""

    def __init__(self, disk: Disk, file: Any, path: str) -> None:
        self._disk, self._file, self._path = disk, file, path

    def write(self, data: Any) -> int:
        return self._disk._write(self._file.fileno(), self._path, data, self._file.write)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *arguments: Any) -> None:
        self._file.close()


def die() -> None:
    """Kill this process, as a machine failure would."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def run_until_killed(world: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> None:
    """Run a job in which one rank calls `die`, and kill the other ranks as soon as it is dead."""
    processes, results = start_ranks(world, function, args)
    deadline = time.monotonic() + timeout
    while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.002)
    killed = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert -signal.SIGKILL in killed, f"no rank was killed: {killed}; {results.get(timeout=1)}"
