"""One job at a time in a run's folder.

RUN/run.lock says who works there; that job touches it every few seconds. Who finds it there decides:

- The owner is a process of this machine, or an earlier start of the same Slurm job: gone, and the lock is taken over at
  once, or alive, and the job is refused.
- The owner is elsewhere: its process cannot be seen from here, but its touches can. One that comes within
  exp_manager.lock_timeout_seconds shows that the owner lives: the job is refused. Without any, its machine has crashed:
  the lock is taken over. No clocks are compared. (flock would not do: on several cluster file systems it is local to a
  machine, or not there.)

An owner that was taken over, since it was cut off for that long, finds out before it commits a checkpoint, and stops.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Optional

import psutil
import torch.distributed as dist

from megatron_anymal.config import ConfigError
from megatron_anymal.resilience.exit_codes import Exit

LOCK = "run.lock"
# Touches within the timeout.
_BEATS = 8


class LockLost(RuntimeError):
    """The run's folder belongs to another job now."""


class FolderInUse(ConfigError):
    """The run's folder belongs to another job that lives."""

    exit_code = Exit.LOCKED


@dataclass(frozen=True)
class Owner:
    """Who works in a run's folder."""

    host: str
    # Of the machine's last start, and of the container: where these differ a process number says nothing.
    boot: str
    pid: int
    # When the process began, in seconds since 1970: process numbers are used again.
    began: float
    user: str
    # Slurm's, and how often it was started anew; "" and 0 without Slurm.
    job: str
    restart: int
    # When the folder was taken.
    since: str
    token: str
    # Slurm's name of a task of a job array, as 36_2: each has a job number of its own. "" elsewhere.
    array: str = ""

    @staticmethod
    def here() -> Owner:
        """This process."""
        return Owner(
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            began=psutil.Process().create_time(),
            user=_user(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            since=datetime.now().isoformat(timespec="seconds"),
            token=uuid.uuid4().hex,
            array=_array_task(),
        )

    def __str__(self) -> str:
        task = f", task {self.array}" if self.array else ""
        job = f", Slurm job {self.job}{task}" if self.job else ""
        return f"process {self.pid} on {self.host} (user {self.user}{job}, since {self.since})"

    def alive(self, seen_by: Owner) -> Optional[bool]:
        """Whether it still runs; None where that cannot be seen from there."""
        if self.job and self.job == seen_by.job and self.restart < seen_by.restart:
            # Slurm starts a job anew only when nothing of it is left.
            return False
        if (self.host, self.boot) != (seen_by.host, seen_by.boot):
            return None
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.began) < 1.0
        except psutil.Error:
            return False


class RunLock:
    """A run's folder, taken by this process until `release`.

    Args:
        timeout: seconds without a touch after which an owner elsewhere counts as gone.
        say: tells the user what is waited for and taken over.

    Raises:
        FolderInUse: another job works there; names it.
        OSError: the folder cannot be written.
    """

    def __init__(self, run_dir: Path, timeout: float, say: Callable[[str], None] = print) -> None:
        self.path, self._timeout, self._say = run_dir / LOCK, timeout, say
        self._owner = Owner.here()
        run_dir.mkdir(parents=True, exist_ok=True)
        while not _create(self.path, self._owner):
            self._make_way()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See that the folder is still this process's.

        Raises:
            LockLost: it is not.
            OSError: that cannot be seen.
        """
        there = _look(self.path)
        # Deleted by hand, perhaps: taken again, unless somebody else was quicker.
        if there is None and _create(self.path, self._owner):
            return
        if there is None or there.owner is None or there.owner.token != self._owner.token:
            new = there.owner if there else None
            raise LockLost(
                f"{str(self.path.parent)!r} was taken over by {new or 'another job'}, since this one gave no sign of "
                f"life for exp_manager.lock_timeout_seconds={self._timeout:g}"
            )

    def release(self) -> None:
        """Give the folder up, if it is still this process's."""
        self._stop.set()
        self._thread.join()
        there = _look(self.path)
        if there and there.owner and there.owner.token == self._owner.token:
            self.path.unlink()

    def _make_way(self) -> None:
        """Return once the lock that lies there is worth another try."""
        there = _look(self.path)
        if there is None:
            return
        who = there.owner or "an unknown job (the file is damaged)"
        alive = there.owner.alive(self._owner) if there.owner else None
        why = "which has ended"
        if alive is None:
            self._say(f"{self.path} names {who}: waiting up to {self._timeout:g} s for a sign of life")
            alive = _shows_life(self.path, there, self._timeout)
            why = f"which gave no sign of life for {self._timeout:g} s"
        if alive:
            raise FolderInUse(
                f"{str(self.path.parent)!r} is in use by {who}. Let it end or stop it, or give this run another folder "
                "(exp_manager.explicit_log_dir)."
            )
        if _take_away(self.path, there):
            self._say(f"taking over {self.path} from {who}, {why}")

    def _beat(self) -> None:
        while not self._stop.wait(self._timeout / _BEATS):
            try:
                there = _look(self.path)
                if there and there.owner and there.owner.token == self._owner.token:
                    os.utime(self.path)
            except OSError:
                # The file system may be back at the next beat.
                continue


def user_of(run_dir: Path, timeout: float) -> Optional[Owner]:
    """The job that works in a run's folder, if it shows that within two touches; takes nothing.

    Args:
        timeout: the run's exp_manager.lock_timeout_seconds.
    """
    path = run_dir / LOCK
    there = _look(path)
    if there is None or there.owner is None:
        return None
    alive = there.owner.alive(Owner.here())
    if alive is None:
        alive = _shows_life(path, there, 2 * timeout / _BEATS)
    return there.owner if alive else None


@contextmanager
def run_lock(run_dir: Path, timeout: float) -> Iterator[Callable[[], None]]:
    """Hold a run's folder; rank 0 does it for all. Collective.

    Yields:
        What raises LockLost once the folder is no longer the run's (on rank 0; elsewhere it does nothing).

    Raises:
        ConfigError: another job works there, or nothing can be written there; on all ranks.
    """
    place = run_dir.absolute()
    if place in _held:
        # The command holds it around the loop, which holds it where there is no command.
        yield _held[place]
        return
    lock: Optional[RunLock] = None
    refused: list[Optional[ConfigError]] = [None]
    if dist.get_rank() == 0:
        try:
            lock = RunLock(place, timeout, lambda text: print(text, flush=True))
        except ConfigError as error:
            refused = [error]
        except OSError as error:
            refused = [
                ConfigError(
                    f"{str(run_dir)!r} cannot be written ({error.strerror}). Name another run folder "
                    "(exp_manager.explicit_log_dir)."
                )
            ]
    dist.broadcast_object_list(refused, src=0)
    if refused[0] is not None:
        raise refused[0]
    _held[place] = lock.check if lock else lambda: None
    try:
        yield _held[place]
    finally:
        del _held[place]
        if lock:
            lock.release()


# What this process holds: folder -> its check.
_held: dict[Path, Callable[[], None]] = {}


@dataclass(frozen=True)
class _Sight:
    """What is seen of a lock; it changes with every touch."""

    # None: the file is damaged, or not yet written.
    owner: Optional[Owner]
    touched: int
    inode: int


def _look(path: Path) -> Optional[_Sight]:
    """None where there is no lock."""
    try:
        # Opened, and not only asked about: that makes NFS look at the server.
        with path.open() as file:
            status = os.fstat(file.fileno())
            text = file.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        text = ""
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError):
        owner = None
    return _Sight(owner, status.st_mtime_ns, status.st_ino)


def _shows_life(path: Path, before: _Sight, seconds: float) -> bool:
    """Whether a lock is touched within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds / 20))
        now = _look(path)
        if now is None:
            return False
        if now != before:
            return True
    return False


def _create(path: Path, owner: Owner) -> bool:
    """Make the lock file; False where there is one."""
    try:
        with path.open("x") as file:
            file.write(json.dumps(asdict(owner), indent=1))
            file.flush()
            os.fsync(file.fileno())
        return True
    except FileExistsError:
        return False


def _take_away(path: Path, seen: _Sight) -> bool:
    """Remove a dead owner's lock; False where another job was quicker."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    taken = _look(aside)
    ours = taken is not None and taken.inode == seen.inode and taken.owner == seen.owner
    if not ours:
        # That of a job that has just taken it over itself: back with it, unless a third one came.
        with suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    return ours


def _array_task() -> str:
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}", "") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array and task else ""


def _boot() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {os.readlink(namespace)}" if boot.is_file() else str(psutil.boot_time())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run a number without a name.
        return str(os.getuid())
