"""Lock that allows one job at a time in a run's folder.

RUN/run.lock names its owner, the job that works in the folder, which touches the file every few seconds. A job that
finds the lock checks the owner:

- The owner is a process on this machine, or an earlier start of the same Slurm job. If it has ended, the lock is taken
  over at once; if it is alive, the new job is refused.
- The owner runs on another machine. Its process cannot be checked from here, but its touches are visible. If one comes
  within exp_manager.lock_timeout_seconds, the owner is alive and the new job is refused; otherwise its machine is taken
  to have crashed, and the lock is taken over. No clocks are compared. (flock does not work here: on several cluster
  file systems it is local to a machine or not supported.)

An owner that lost the lock because it was cut off for that long notices before it commits a checkpoint, and stops.
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
# Number of touches within the timeout.
_BEATS = 8


class LockLost(RuntimeError):
    """The run's folder now belongs to another job."""


class FolderInUse(ConfigError):
    """The run's folder belongs to another job that is still running."""

    exit_code = Exit.LOCKED


@dataclass(frozen=True)
class Owner:
    """Process that works in a run's folder."""

    # Host name.
    host: str
    # Identifies the machine's boot and the PID namespace; process IDs are only comparable if it matches.
    boot: str
    # Process ID.
    pid: int
    # Start time of the process in seconds since the epoch, since process IDs are reused.
    began: float
    # User name, or the user ID if it has no name.
    user: str
    # Slurm job ID; "" without Slurm.
    job: str
    # Slurm restart count; 0 without Slurm.
    restart: int
    # Local time at which the lock was taken, in ISO 8601 to the second.
    since: str
    # Random ID of this owner, unique to each time the lock is taken.
    token: str
    # Slurm job array task such as 36_2, since each task has its own job ID; "" outside job arrays.
    array: str = ""

    @staticmethod
    def this_process() -> Owner:
        """Owner record of this process."""
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
        """Whether this process is still running; None if `seen_by` cannot determine it."""
        if self.job and self.job == seen_by.job and self.restart < seen_by.restart:
            # Slurm restarts a job only once all its processes are gone.
            return False
        if (self.host, self.boot) != (seen_by.host, seen_by.boot):
            return None
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.began) < 1.0
        except psutil.Error:
            return False


class RunLock:
    """Lock on a run's folder, held by this process until `release`.

    Args:
        timeout: seconds without a touch after which an owner on another machine counts as gone.
        say: prints to the user what is being waited for and what was taken over.

    Raises:
        FolderInUse: another job works in the folder; the message names it.
        OSError: the folder cannot be written.
    """

    def __init__(self, run_dir: Path, timeout: float, say: Callable[[str], None] = print) -> None:
        self.path, self._timeout, self._say = run_dir / LOCK, timeout, say
        self._owner = Owner.this_process()
        run_dir.mkdir(parents=True, exist_ok=True)
        while not _create(self.path, self._owner):
            self._make_way()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Verify that this process still holds the lock.

        Raises:
            LockLost: it does not.
            OSError: the lock file cannot be read.
        """
        seen = _look(self.path)
        # The file may have been deleted by hand: take the lock again unless another job was faster.
        if seen is None and _create(self.path, self._owner):
            return
        if seen is None or seen.owner is None or seen.owner.token != self._owner.token:
            new = seen.owner if seen else None
            raise LockLost(
                f"{str(self.path.parent)!r} was taken over by {new or 'another job'}, because this job gave no sign of "
                f"life for exp_manager.lock_timeout_seconds={self._timeout:g}"
            )

    def release(self) -> None:
        """Release the lock, if this process still holds it."""
        self._stop.set()
        self._thread.join()
        seen = _look(self.path)
        if seen and seen.owner and seen.owner.token == self._owner.token:
            self.path.unlink()

    def _make_way(self) -> None:
        """Check the existing lock; remove it if its owner is gone. The caller then tries to create it again."""
        seen = _look(self.path)
        if seen is None:
            return
        who = seen.owner or "an unknown job (the file is damaged)"
        alive = seen.owner.alive(self._owner) if seen.owner else None
        why = "which has ended"
        if alive is None:
            self._say(f"{self.path} names {who}: waiting up to {self._timeout:g} s for a sign of life")
            alive = _shows_life(self.path, seen, self._timeout)
            why = f"which gave no sign of life for {self._timeout:g} s"
        if alive:
            raise FolderInUse(
                f"{str(self.path.parent)!r} is in use by {who}. Wait for it to end, stop it, or give this run another "
                "folder (exp_manager.explicit_log_dir)."
            )
        if _take_away(self.path, seen):
            self._say(f"taking over {self.path} from {who}, {why}")

    def _beat(self) -> None:
        while not self._stop.wait(self._timeout / _BEATS):
            try:
                seen = _look(self.path)
                if seen and seen.owner and seen.owner.token == self._owner.token:
                    os.utime(self.path)
            except OSError:
                # The file system may be available again at the next beat.
                continue


def user_of(run_dir: Path, timeout: float) -> Optional[Owner]:
    """Return the owner of a run's folder if it is alive, without taking the lock.

    An owner on another machine counts as alive if it touches the lock within two touch intervals.

    Args:
        timeout: the run's exp_manager.lock_timeout_seconds, in seconds.
    """
    path = run_dir / LOCK
    seen = _look(path)
    if seen is None or seen.owner is None:
        return None
    alive = seen.owner.alive(Owner.this_process())
    if alive is None:
        alive = _shows_life(path, seen, 2 * timeout / _BEATS)
    return seen.owner if alive else None


@contextmanager
def run_lock(run_dir: Path, timeout: float) -> Iterator[Callable[[], None]]:
    """Hold the lock on a run's folder; rank 0 holds it for all ranks. Collective.

    Args:
        timeout: the run's exp_manager.lock_timeout_seconds, in seconds.

    Yields:
        Function that raises LockLost once the folder no longer belongs to the run (a no-op on ranks other than 0).

    Raises:
        ConfigError: another job works in the folder, or it cannot be written; raised on all ranks.
    """
    folder = run_dir.absolute()
    if folder in _held:
        # Re-entrant: the command takes the lock around the training loop, which takes it itself if called directly.
        yield _held[folder]
        return
    lock: Optional[RunLock] = None
    refused: list[Optional[ConfigError]] = [None]
    if dist.get_rank() == 0:
        try:
            lock = RunLock(folder, timeout, lambda text: print(text, flush=True))
        except ConfigError as error:
            refused = [error]
        except OSError as error:
            refused = [
                ConfigError(
                    f"{str(run_dir)!r} cannot be written ({error.strerror}). Choose another run folder "
                    "(exp_manager.explicit_log_dir)."
                )
            ]
    dist.broadcast_object_list(refused, src=0)
    if refused[0] is not None:
        raise refused[0]
    _held[folder] = lock.check if lock else lambda: None
    try:
        yield _held[folder]
    finally:
        del _held[folder]
        if lock:
            lock.release()


# Locks held by this process: folder -> check function.
_held: dict[Path, Callable[[], None]] = {}


@dataclass(frozen=True)
class _Sight:
    """Observed state of a lock file; it changes with every touch."""

    # None if the file is damaged or not yet written.
    owner: Optional[Owner]
    touched: int
    inode: int


def _look(path: Path) -> Optional[_Sight]:
    """Read the lock file; None if there is none."""
    try:
        # Opened rather than only stat'ed: opening makes NFS revalidate its cache with the server.
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
    """Whether a lock is touched within the given number of seconds."""
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
    """Create the lock file; False if one exists already."""
    try:
        with path.open("x") as file:
            file.write(json.dumps(asdict(owner), indent=1))
            file.flush()
            os.fsync(file.fileno())
        return True
    except FileExistsError:
        return False


def _take_away(path: Path, seen: _Sight) -> bool:
    """Remove a dead owner's lock; False if another job was faster."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    taken = _look(aside)
    ours = taken is not None and taken.inode == seen.inode and taken.owner == seen.owner
    if not ours:
        # It belongs to another job that has just taken over itself: put it back, unless a third job holds one now.
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
        # In a container the user ID may have no name.
        return str(os.getuid())
