"""The launcher's side of the standby process, which forks the agent and the ranks of every attempt.

A rank's start is mostly imports. The standby process (standby_process.py) has them behind it: a process that it forks
begins at once, and its imported code takes no memory of its own. Where the standby process cannot be used, processes
are started the usual way.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

from megatron_anymal.processes.child_processes import children, end_group

# Environment variable with the path of the standby process's socket.
SOCKET = "ANYMAL_STANDBY"
# What every rank imports, and torchrun's agent.
RANK_MODULES = (
    "torch.distributed.run",
    "megatron_anymal.nemo.model",
    "megatron_anymal.train.loop",
    "megatron_anymal.generation.validation_answers",
    "megatron_anymal.nemo.entry",
    "nemo.utils.exp_manager",
    # Audio encoders, and the random states of loaders.
    "transformers.feature_extraction_sequence_utils",
    "numpy.random",
)
# Name of the file next to the socket that holds the configurations that were composed ahead.
COMPOSED = "composed"
# Longest message, in bytes: the environment and the command line of a process.
MESSAGE = 1 << 20
# Exit code of the process if its imports have made forks unsafe.
UNSAFE = 3
# Linux prctl option PR_SET_NAME: the name that top shows.
_SET_NAME = 15
# Seconds to wait for an answer; forking takes milliseconds.
_ANSWER = 20.0
# Polling interval, and how long the standby process may take to note the end of a process, in seconds.
_LOOK, _NOTE = 0.02, 2.0


class Standby:
    """A standby process, started again if it has ended.

    Args:
        environment: that of the processes to start.
        modules: what to import.
        say: prints a message to the user.
        composed: configurations that were composed ahead (config.composed_ahead.export); empty: none.

    Attributes:
        folder: its files; outlives the attempts.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        modules: Sequence[str],
        say: Callable[[str], None],
        composed: bytes = b"",
    ) -> None:
        self._environment, self._modules, self._say = dict(environment), list(modules), say
        self.folder = Path(tempfile.mkdtemp(prefix="anymal_standby_"))
        (self.folder / COMPOSED).write_bytes(composed)
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._ready = self._declined = False
        self.begin()

    @property
    def socket(self) -> Path:
        """Its socket; exists once everything is imported."""
        return self.folder / "socket"

    def begin(self) -> None:
        """Start the process if it is not running. It imports in the background."""
        if self._declined or (self._process is not None and self._process.poll() is None):
            return
        self._ready = False
        self.socket.unlink(missing_ok=True)
        words = [str(os.getpid()), str(self.socket), *self._modules]
        command = [sys.executable, "-u", "-m", f"{__name__}_process", *words]
        environment = {
            # Libraries that start threads when they are imported: OpenBLAS's pool, pyarrow's allocator.
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
            **self._environment,
        }
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)

    def wait(self, check: Callable[[], None], seconds: float) -> bool:
        """Wait until the process is ready; return whether it is.

        Args:
            check: called while waiting; may raise to end the wait.
            seconds: longest wait.
        """
        if self._declined or self._process is None:
            return False
        deadline = time.monotonic() + seconds
        while not self._ready and self._process.poll() is None and time.monotonic() < deadline:
            check()
            self._ready = self.socket.exists()
            time.sleep(0 if self._ready else _LOOK)
        self._declined = self._process.poll() == UNSAFE
        if self._process.poll() is not None and not self._declined:
            self._say(f"the standby process ended with exit code {self._process.returncode}: starting the ranks anew")
        return self._ready and self._process.poll() is None

    def give_up(self) -> None:
        """End the process for good if it runs but declined, since it would decline again."""
        if self._process is not None and self._process.poll() is None:
            self._declined = True
            self._process.kill()
            self._process.wait()

    def end_all(self, but: Collection[int] = ()) -> None:
        """Kill whatever it has forked, except these process IDs; what the launcher knows of has ended by then."""
        if self._process is not None:
            for pid in children(self._process.pid):
                if pid not in but:
                    end_group(pid)

    def close(self) -> None:
        """End the process and every process that it forked."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Request:
    """What a process is to be: `python -m module arguments...`.

    Attributes:
        module: what to run.
        arguments: its command line.
        environment: all variables of the process.
        note: folder in which its end is noted, in a file exit_PID.
        folder: its working directory.
        pid: a process that the standby process has forked before, whose end is to be noted in `note` from now on; 0: a
            new process.
    """

    module: str
    arguments: list[str]
    environment: dict[str, str]
    note: str
    folder: str
    pid: int = 0


def listen(path: Path) -> socket.socket:
    """Create a socket for requests; complete when it appears under its name."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * MESSAGE)
    listening.bind(f"{path}.part")
    listening.listen(64)
    os.rename(f"{path}.part", path)
    return listening


def receive(connection: socket.socket) -> tuple[Request, list[int]]:
    """Receive a request, and file descriptors of the process's standard output and error."""
    message, files, _, _ = socket.recv_fds(connection, MESSAGE, 8)
    return Request(**json.loads(message)), files


def become(request: Request, files: Sequence[int]) -> None:
    """In the process of a request: take on its output, working directory, variables, command line and name."""
    for target, file in enumerate(files, start=1):
        os.dup2(file, target)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = [request.module, *request.arguments]
    # The command line that ps shows stays that of the standby process.
    rank = request.environment.get("RANK")
    name = "anymal agent" if rank is None else f"anymal rank {rank}"
    ctypes.CDLL(None).prctl(_SET_NAME, name.encode()[:15])


class Forked:
    """A process that the standby process forked, with the part of subprocess.Popen's interface that agents use.

    Attributes:
        args: command line.
        pid: process ID.
        returncode: exit code, or negative signal number; None while it runs.
    """

    def __init__(self, args: Sequence[str], pid: int, note: Path) -> None:
        self.args, self.pid, self._note = list(args), pid, note
        self.returncode: Optional[int] = None
        self._gone: Optional[float] = None

    def poll(self) -> Optional[int]:
        """Exit code, or negative signal number; None while it runs."""
        if self.returncode is None:
            with suppress(OSError, ValueError):
                self.returncode = int(self._note.read_text())
        if self.returncode is None and not Path(f"/proc/{self.pid}").exists():
            # The standby process notes every end, unless it was killed.
            self._gone = self._gone or time.monotonic()
            if time.monotonic() - self._gone > _NOTE:
                self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: Optional[float] = None) -> int:
        """Wait for its end and return the exit code.

        Args:
            timeout: seconds; None: for ever.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(_LOOK)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def fork(
    path: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], note: Path, output: Sequence[int]
) -> Optional[Forked]:
    """Have the standby process fork a process that runs `python -m module arguments...`.

    Args:
        path: the standby process's socket, or that of a process that it forked earlier and that is to run this next.
        environment: all variables of the process.
        note: folder in which its end is noted, in a file exit_PID.
        output: file descriptors of its standard output and error.

    Returns:
        None if the standby process is gone or declines, which it says on standard error.
    """
    pid = send(path, Request(module, list(arguments), dict(environment), str(note), os.getcwd()), output)
    return None if pid is None else Forked([sys.executable, "-m", module, *arguments], pid, note / f"exit_{pid}")


def send(path: str, request: Request, output: Sequence[int]) -> Optional[int]:
    """Send a request; return the ID of the process that took it on, or None if there is none.

    Args:
        path: socket of `listen`.
        output: file descriptors of the process's standard output and error.
    """
    message = json.dumps(asdict(request)).encode()
    if len(message) > MESSAGE:
        return None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_ANSWER)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE)
            connection.connect(path)
            socket.send_fds(connection, [message], list(output))
            return int(connection.recv(64))
    except (OSError, ValueError):
        return None
